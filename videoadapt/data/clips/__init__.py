"""Turns videos into batches: training clips, evaluation views and thumbnails. Read first: `loader.py`.

Path of a training clip: `datasets.py` (one clip) -> `augment.py` (crop, flip, colour) -> `workers.py` (processes) ->
`loader.py` (batches). Evaluation uses `views.py` in place of `augment.py`. `token_labels.py` has LV-ViT's targets of
patches; `clip_dataset.py` gives the same clips to code of one's own.

Shape letters: B clips, K temporal clips of a video, X spatial crops of a clip, C = 3 channels, T frames, H height,
W width, S side of a square crop, A frames of a thumbnail, s side of a thumbnail, N patches of a frame.
"""

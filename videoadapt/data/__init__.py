"""From annotation lists and video files to batches of clips.

`index` finds the videos and writes the manifest, `video` reads frames of one file, `clips` makes batches of clips.
May use `config`, `runtime` and `model`.
Read first: `clips/loader.py`.
"""

"""From annotations and video files to batches of clips.

`index` lists the videos and writes the manifest, `video` reads frames of one file, `clips` makes batches of clips.
`synthetic` generates the demo's videos, `pictures` makes JPEG files of frames.
May use `config`, `runtime` and `model`.
Read first: `clips/loader.py`.
"""

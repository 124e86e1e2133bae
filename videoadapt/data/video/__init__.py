"""Reads frames of video files, images and folders of images. Read first: `readers.py`.

`probe.py` finds what a file holds, `frame_sampling.py` chooses frame numbers, `readers.py` returns the frames, and
`decoding.py` decodes with PyAV. `verify.py` decodes whole files to find damage.
"""

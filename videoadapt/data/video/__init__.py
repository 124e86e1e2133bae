"""Reads frames of video files, images and folders of images. Read first: `readers.py`.

`probe.py` reads the properties of a file, `frame_sampling.py` chooses frame numbers, `readers.py` returns the frames,
and `decoding.py` decodes with PyAV. `verify.py` decodes whole files to find damage.
"""

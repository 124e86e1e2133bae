"""Reads frames of video files, images and folders of images.

Read first: `readers.py`.

    a file      probe (its properties), frame_times (its rate), orientation, suffixes, limits
    its frames  frame_sampling chooses their numbers; readers returns them, by decoding (PyAV) and images
    damage      verify decodes whole files; files has the texts of errors
"""

"""Frames of one video file or image folder. Read first: `readers.py`."""

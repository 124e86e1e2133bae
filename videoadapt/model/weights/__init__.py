"""Pretrained weights of other projects: where they come from, their layouts, and loading. Read first: `load.py`."""

"""Pretrained weights of other projects: reading their files, translating their names, and filling a model.

Read first: `load.py`; `sources.py` reads files, `layouts.py` translates names.
"""

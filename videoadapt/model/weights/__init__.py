"""Pretrained weights of other projects: reads their files, translates their names, and fills a model.

Read first: `load.py`; `sources.py` reads files, `layouts.py` translates names. `facts.py` says what a source is,
`initial.py` makes the model with which a training begins.
"""

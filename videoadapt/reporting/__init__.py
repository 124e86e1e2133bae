"""The page of a run, or of several (`page.py`, with the template in `template/`), and the figures (`plots.py`).

May use every room below it, from `evaluation` down.
Read first: `page.py`, which shows `run_data`, `examples` and the `sentence` at the top.
"""

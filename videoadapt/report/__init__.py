"""The clip-level cost report of an evaluated run.

May use every room below it, from `evaluation` down.
Read first: `plots.py`.
"""

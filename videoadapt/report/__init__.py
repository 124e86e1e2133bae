"""The figures of a run: curves, accuracy against cost, confusions, and the cost of clips.

May use every room below it, from `evaluation` down.
Read first: `plots.py`.
"""

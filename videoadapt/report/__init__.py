"""The figures of an evaluated run: the cost of clips, and accuracy against cost.

May use every room below it, from `evaluation` down.
Read first: `plots.py`.
"""

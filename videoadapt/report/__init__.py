"""The figures of an evaluated run: what clips cost, and accuracy against cost.

May use every room below it, from `evaluation` down.
Read first: `plots.py`.
"""

"""Measures and predicts how fast training and inference are. No room below needs it.

May use every room below it, from `report` down.
Read first: `plan.py`.
"""

"""How fast training and inference are, measured and predicted. No room below needs it.

May use every room below it, from `report` down.
Read first: `plan.py`.
"""

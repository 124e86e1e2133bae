"""Clips for training and views for evaluation, batched. Read first: `loader.py`."""

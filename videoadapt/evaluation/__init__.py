"""What a trained model is worth: accuracy with intervals, cost and speed of every policy, and predictions.

May use every room below it, from `routing` down.
Read first: `evaluate.py`.
"""

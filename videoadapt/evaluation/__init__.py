"""Accuracy with intervals, cost and speed of every policy on a trained model, and predictions.

May use every room below it, from `routing` down.
Read first: `evaluate.py`.
"""

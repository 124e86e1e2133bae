"""Accuracy with intervals, cost and speed of every policy on a trained model, and predictions.

May use every room below it, from `routing` down.
Read first: `evaluate.py`.

    accuracy and cost  outcomes, intervals, against_fixed, costs
    speed              speed, speed_passes
    files              result_tables, logits_file, and evaluated, which reads them
    other verbs        compare, predict, explain, with reasons
"""

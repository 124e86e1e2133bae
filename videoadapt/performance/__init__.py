"""Measures and predicts how fast training and inference are. No room below needs it.

May use every room below it, from `reporting` down.
Read first: `plan.py`, which uses the times of `timing` and the bytes of `memory`. `bench/` has the benchmarks.
"""

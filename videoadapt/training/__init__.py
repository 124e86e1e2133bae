"""Stage 1: trains one model at all its operating points, by one process or by groups of ranks.

May use `config`, `runtime`, `model` and `data`.
Read first: `train.py`.
"""

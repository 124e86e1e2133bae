"""Stage 1: trains one model at all its points, in one process or in groups of ranks.

May use `config`, `runtime`, `model`, `data` and `errors`.
Read first: `train.py`, which has the loop. Then `step.py`, which has one optimizer step.
"""

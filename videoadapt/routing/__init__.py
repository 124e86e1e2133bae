"""Stage 2: labels, the assigner, and the policies that give each clip its operating point.

May use `config`, `runtime`, `model`, `data` and `training`.
Read first: `policy.py`, then `router.py`, whose `decide` runs every policy.
"""

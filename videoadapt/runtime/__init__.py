"""The machine and the job around a run: messages, files, devices, signals, SLURM, ranks.

May use `config`.
Read first: `ranks.py`.
"""

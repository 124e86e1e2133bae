"""The user's interface: the command line, the demo, jobs on SLURM, and printed tables.

May use every room.
Read first: `cli.py`.
"""

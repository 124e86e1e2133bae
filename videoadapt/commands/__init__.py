"""What people type and what they see: the command line, the demo, launching on SLURM, and printed tables.

May use every room.
Read first: `cli.py`.
"""

"""The user's interface: the command line, the demo, jobs on SLURM, and printed tables.

May use every room.
Read first: `cli.py`.

    the command line   cli, stage, failure, verbs (the same as functions)
    printed results    tables, speed_table
    verbs of their own demo, new, recommend (the choices of `new`), launch
    serve/             the local page
"""

"""Operating points, their costs, and the typed sections of a YAML config.

Uses no other room.
Read first: `points.py`, then `sections.py`.

    concepts  points, cascade, views, cost
    keys      sections, jobs (`slurm`), reference (their documentation)
    reading   load, parse, suggest
"""

"""Operating points, their costs, and the typed sections of a YAML config.

Uses no other room.
Read first: `points.py`, then `sections.py`.
"""

"""`videoadapt bench`: parts of videoadapt beside what people would use instead. Read first: `points.py`."""

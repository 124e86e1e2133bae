"""`videoadapt bench`: measures our loaders beside other libraries, and a model's points. Read first: `points.py`."""

"""Which videos there are: annotation lists, probing, and the manifest. Read first: `manifest.py`."""

"""Lists the videos of a config, probes their files and writes the manifest, the table that every stage reads.

`annotations` reads lists in the formats of `formats`, `probe_pool` probes files in processes, `summary` and `check`
report on the result. Read first: `manifest.py`.
"""

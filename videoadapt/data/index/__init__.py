"""Lists the videos of a config, probes their files and writes the manifest, the table that every stage reads.

Read first: `manifest.py`.

    what is listed     annotations, of sources: lists, class_folders, and tables in the formats of formats; text
    its classes        labels, class_names, class_files
    its files          find_files, look_up, media_kinds, identity (which entries are the same video)
    their properties   probe_pool, whose processes come from fork_server
    reports            summary, check, survey (of a folder without a config)
"""

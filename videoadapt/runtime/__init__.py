"""The machine and the job around a run: messages, files, devices, signals, SLURM, ranks.

May use `config`.
Read first: `ranks.py`.

    the machine     machine, energy, seeds
    ranks and jobs  ranks, rendezvous, heartbeats, signals, slurm
    the run folder  files, run_config, lease (one writer), inputs (what an output was made from)
    output          console, results
"""

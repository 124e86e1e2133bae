"""Stage 2: labels, the assigner, and the policies that give each clip its operating point.

May use `config`, `runtime`, `model`, `data` and `training`.
Read first: `policy.py`, then `decide.py`, which runs every policy, and `router.py`, which batches clips by point.

    labels       scores, label, label_rules, label_inputs
    assigner     assigner, thumbnails, fit_assigner, threshold
    policies     policy, leap_rules, decide, replay
    routing      router, arrivals, queues, stage_clock
    calibration  calibrate, candidates, calibrate_policies, learn_then_test, policy_file
"""

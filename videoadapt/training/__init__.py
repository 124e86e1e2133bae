"""Stage 1: trains one model at all its points, in one process or in groups of ranks.

May use `config`, `runtime`, `model`, `data` and `errors`.
Read first: `train.py`, which has the loop. Then `step.py`, which has one optimizer step.

    a step    draws (its points), losses, optim, freeze, compile
    ranks     groups (who trains what), ddp and exchange (who sends what), overlap (in which order)
    the run   preflight, state, trained_clips, validate
    reports   metrics, step_report, tracker, throughput, utilisation
    times     pass_time, forecast
"""

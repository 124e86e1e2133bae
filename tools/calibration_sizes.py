"""Prints how many videos a calibration needs: `python tools/calibration_sizes.py`; the table of docs/calibrate.md."""

from __future__ import annotations

from videoadapt.routing.learn_then_test import videos_needed
from videoadapt.runtime.console import print_table

PROMISES = ((0.005, 0.1), (0.01, 0.1), (0.01, 0.05), (0.02, 0.1), (0.05, 0.1))  # eps and delta
LOSSES = (0.0, 0.25, 0.5, 0.75)  # of a policy, as fractions of eps


def main() -> None:
    """Prints the table."""
    columns = ("eps points", "delta", *(f"loses {100 * loss:g} % of eps" for loss in LOSSES))
    # The order that the label table favours has half of delta.
    rows = [
        (f"{100 * eps:g}", f"{delta:g}", *(videos_needed(loss * eps, eps, delta / 2) for loss in LOSSES))
        for eps, delta in PROMISES
    ]
    print_table("videos of data.calibrate", columns, rows)


if __name__ == "__main__":
    main()

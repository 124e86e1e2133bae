"""Results as files and as the tables that people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videoadapt.runtime.console import macs, percent, print_table, say

SHOWN = 10  # failed videos
_CAUSES_SHOWN, _EXAMPLES_SHOWN = 4, 2  # so that a population fits on a screen
_CLASSES_SHOWN = 20  # of the mix of points


def print_index(summary: dict[str, Any]) -> None:
    """The population on one screen: what was listed, what of it can be read, and what is doubtful about it."""
    rows = [
        (
            name,
            *(s[key] for key in ("listed", "ok", "missing", "broken", "damaged", "classes")),
            f"{s['hours']:.2f}",
            " / ".join(f"{seconds:.1f}" for seconds in s["seconds"]) or "-",
        )
        for name, s in summary["splits"].items()
    ]
    columns = (
        "split",
        "listed",
        "readable",
        "missing",
        "broken",
        "damaged",
        "classes",
        "hours",
        "shortest / median / longest s",
    )
    print_table(f"Manifest {summary['manifest']}, of {summary['classes']} classes", columns, rows)
    if summary["readers"]:
        readers = ", ".join(f"{name} {count}" for name, count in summary["readers"].items())
        say(f"readers to trust: {readers}; decoded whole to find damage: {summary['verified']}")
    _say_examples("missing files", summary["missing"])
    for cause in summary["broken"][:_CAUSES_SHOWN]:
        say(f"broken: {cause['count']} of cause `{cause['cause']}`, the first {cause['first'][0]}")
    others = summary["broken"][_CAUSES_SHOWN:]
    if others:
        say(f"broken: {sum(cause['count'] for cause in others)} of {len(others)} other causes, in index.json")
    _say_examples("damaged", summary["damaged"])
    duplicates, leaks = summary["duplicates"], summary["leaks"]
    _say_examples("listed twice, counted once", duplicates["listed_twice"])
    _say_examples("further files of the same name", duplicates["further_files"])
    _say_examples("groups of files with the same content", duplicates["same_content"])
    _say_examples("leaks between splits, the same video", leaks["same_id"])
    _say_examples("leaks between splits, clips of the same YouTube video", leaks["same_source"])
    _say_examples("leaks between splits, the same content", leaks["same_content"])
    if not any(some["count"] for some in (*duplicates.values(), *leaks.values())):
        say("no duplicates, and no leaks between splits")


def _say_examples(name: str, some: dict[str, Any]) -> None:
    """How many there are and the first of them; nothing if there are none."""
    if not some["count"]:
        return
    say(f"{name}: {some['count']}")
    for item in some["first"][:_EXAMPLES_SHOWN]:
        say("  " + (item if isinstance(item, str) else "  =  ".join(item[:_EXAMPLES_SHOWN])))


def print_check(result: dict[str, Any]) -> None:
    """How the files differ from their manifest."""
    changes = result["changes"]
    rows = [*changes.items(), ("unchanged", result["unchanged"]), ("listed", result["videos"])]
    print_table("Check", (f"manifest {result['manifest']}", "videos"), rows)
    for difference in result["differences"][:SHOWN]:
        cause = f": {difference['cause']}" if difference["cause"] else ""
        say(f"  {difference['change']}: {difference['path']} ({difference['split']}){cause}")
    if len(result["differences"]) > SHOWN:
        say(f"  and {len(result['differences']) - SHOWN} more; --json lists all")


def print_train(summary: dict[str, Any]) -> None:
    """Training metrics of the last epoch."""
    rows = [
        (point, f"{v['loss']:.3f}", percent(v["top1"])) if v["loss"] is not None else (point, "not drawn", "-")
        for point, v in summary["points"].items()
    ]
    print_table("Last epoch, on the training clips", ("point", "loss", "top-1 %"), rows)
    say(
        f"{summary['steps']} steps; {summary['clips_per_s']:.1f} clips/s, "
        f"{summary['wait_fraction']:.0%} of the time waiting for data; {summary['skipped']} clips skipped; "
        f"checkpoint {summary['checkpoint']}"
    )


def print_label(summary: dict[str, Any]) -> None:
    """How often each point is right, and how the labels fall."""
    total = summary["clips"]
    rows = [
        (point, percent(v["right"]), v["labelled"], percent(v["labelled"] / total))
        for point, v in summary["points"].items()
    ]
    print_table(
        f"Labels of {total} clips, source {summary['source']}", ("point", "right %", "labelled", "share %"), rows
    )
    say(f"no point is right on {summary['none_right_clips']} clips (rule: {summary['none_right']})")
    for failure in summary["failed"]:
        say(f"  not labelled: {failure['path']}: {failure['cause']}")


def print_assign(summary: dict[str, Any]) -> None:
    """The assigner on the clips that chose its threshold."""
    rows = [
        ("clips fitted / choosing the threshold", f"{summary['clips_fitted']} / {summary['clips_selecting']}"),
        ("threshold", f"{summary['threshold']:.3f}"),
        (
            "accuracy, assigned / costliest %",
            f"{percent(summary['accuracy'])} / {percent(summary['accuracy_costliest'])}",
        ),
        ("MACs saved %", percent(summary["macs_saved"])),
        ("mix", ", ".join(f"{p}: {percent(v)} %" for p, v in summary["mix"].items())),
        (
            "cost per clip",
            f"{macs(summary['assigner_macs'])} MACs, {100 * summary['assigner_fraction']:.2f} % of the costliest point",
        ),
    ]
    print_table("Assigner", ("on the clips that chose its threshold", ""), rows)


def print_evaluate(summary: dict[str, Any]) -> None:
    """One line per policy: accuracy with intervals, cost, speed."""
    wrong = summary["failed_count_as"] == "wrong"
    other = "top1_readable" if wrong else "top1_failed_wrong"
    rows = []
    for name, p in summary["policies"].items():
        difference, low, high = (100 * v for v in p["difference_to_costliest"])
        speed = "-" if p["clips_per_s"] is None else f"{p['clips_per_s']:.1f}"
        rows.append(
            (
                f"{name} *" if p["pareto"] else name,
                f"{percent(p['top1'])} ({percent(p['top1_low'])} to {percent(p['top1_high'])})",
                *((percent(p[other]),) if summary["failed"] else ()),
                f"{difference:+.1f} ({low:+.1f} to {high:+.1f})",
                "-" if p["top5"] is None else percent(p["top5"]),
                f"{percent(p['mean_class'])} ({percent(p['mean_class_low'])} to {percent(p['mean_class_high'])})",
                macs(p["macs_per_view"]),
                macs(p["macs_per_video"]),
                percent(p["macs_saved"]),
                speed,
            )
        )
    columns = (
        "policy",
        "top-1 % (95 %)",
        *(("readable alone" if wrong else "failed as wrong",) if summary["failed"] else ()),
        "to costliest",
        "top-5 %",
        "mean class %",
        "MACs/view",
        "MACs/video",
        "saved %",
        "clips/s",
    )
    title = (
        f"{summary['listed']} videos listed, {summary['scored']} read; {summary['temporal_views']} clips x "
        f"{summary['spatial_crops']} crops a video"
    )
    print_table(title, columns, rows)
    counts = "as wrong" if wrong else "not at all (evaluate.failed: exclude)"
    say("* on the Pareto front of top-1 and MACs: none but the oracle is better and not costlier, or as good for less")
    say(f"manifest {summary['manifest']}; {len(summary['failed'])} videos failed, and count {counts}")
    for failure in summary["failed"][:SHOWN]:
        say(f"  failed: {failure['path']}: {failure['cause']}")
    if len(summary["failed"]) > SHOWN:
        say(f"  and {len(summary['failed']) - SHOWN} more, in evaluate.json")
    if summary["hardest_classes"]:
        hardest = ", ".join(
            f"{row['class']} {percent(row['top1'])} %"
            + (f" (taken for {row['taken_for']})" if row["taken_for"] else "")
            for row in summary["hardest_classes"]
        )
        say(f"hardest classes of {next(iter(summary['policies']))}: {hardest}; all classes: evaluate/classes.csv")
    if "assigned" in summary["policies"]:
        _say_assigned(summary["policies"]["assigned"], summary["assigner_macs"])
    else:
        say("no assigner yet: `videoadapt label` and `videoadapt assign` add the policies assigned and random")
    say(
        "MACs are multiply-adds (the papers' FLOPs), the assigner's included; "
        "clips/s: assigner, routing and model, decoding apart"
    )


def _say_assigned(row: dict[str, Any], assigner: int) -> None:
    view, video = macs(row["macs_per_view_without_assigner"]), macs(row["macs_per_video_without_assigner"])
    say(f"assigned, without its assigner ({macs(assigner)} MACs a clip): {view} MACs a view, {video} a video")
    difference, low, high = (100 * value for value in row["difference_to_random"])
    say(f"assigned against random routing with the same mix: {difference:+.1f} points ({low:+.1f} to {high:+.1f})")


def print_compare(summary: dict[str, Any]) -> None:
    """One line per pair of policies."""
    rows = []
    for row in summary["policies"]:
        difference, low, high = (100 * value for value in row["difference"])
        rows.append(
            (
                " / ".join(dict.fromkeys(row["policies"])),
                *map(percent, row["top1"]),
                f"{difference:+.1f} ({low:+.1f} to {high:+.1f})",
                *row["right_in_one_only"],
                f"{row['p_value']:.2g}",
            )
        )
    a, b = summary["runs"]
    print_table(
        f"A = {a}, B = {b}, on the {summary['common']} videos of both",
        ("policy", "A top-1 %", "B top-1 %", "A - B (95 %)", "right in A only", "in B only", "p"),
        rows,
    )
    if summary["manifests"][0] == summary["manifests"][1]:
        files = "the same files" if summary["files"][0] == summary["files"][1] else "but OTHER FILES of these videos"
        say(f"the same manifest, {summary['manifests'][0]}, {files}; failed videos: {summary['failed_count_as']}")
    else:
        listed = " and ".join(map(str, summary["listed"]))
        say(
            f"the manifests differ ({' and '.join(summary['manifests'])}; {listed} videos listed): only videos that "
            f"both list are compared; failed videos: {summary['failed_count_as']}"
        )
    say("p: exact McNemar test, two-sided, of the videos that only one gets right; no correction for several policies")


def print_flops(summary: dict[str, Any]) -> None:
    """The costs as tables."""
    rows = []
    for point in summary["points"]:
        parts = [macs(v) for v in point["parts"].values()]
        rows.append((point["point"], *parts, macs(point["macs_per_view"]), macs(point["macs_per_video"])))
    columns = ("point", "embedding", "temporal", "spatial", "MLP", "head", "per view", "per video")
    print_table(f"MACs (multiply-adds; the papers' FLOPs), {summary['views_per_video']} views a video", columns, rows)
    if summary["assigner_macs"] is not None:
        share = summary["assigner_macs"] / summary["points"][0]["macs_per_view"]
        say(
            f"assigner: {macs(summary['assigner_macs'])} MACs a clip, "
            f"{100 * share:.2f} % of a view at the costliest point"
        )
    if "clips" in summary:
        _print_clips(summary["clips"])
        rows = [
            (p["policy"], macs(p["macs_per_clip"]), macs(p["macs_per_video"]), percent(p["top1"]), "*" * p["pareto"])
            for p in sorted(summary["policies"], key=lambda p: -p["macs_per_clip"])
        ]
        print_table("Policies, costliest first", ("policy", "MACs/clip", "MACs/video", "top-1 %", "Pareto front"), rows)


def _print_clips(report: dict[str, Any]) -> None:
    rows = [
        (name, *(macs(report[f"macs_per_{name}"][key]) for key in ("mean", "median", "p95")))
        for name in ("clip", "video")
    ]
    print_table(
        f"Measured costs, policy {report['policy']} (MACs, all crops)", ("per", "mean", "median", "95th %"), rows
    )
    points = list(report["mix"])
    overall = ("all", "", "", *(percent(v) for v in report["mix"].values()))
    by_cost = sorted(report["classes"], key=lambda row: -row["macs_per_clip"])
    shown = (
        by_cost
        if len(by_cost) <= _CLASSES_SHOWN
        else [*by_cost[: _CLASSES_SHOWN // 2], *by_cost[-_CLASSES_SHOWN // 2 :]]
    )
    lines = [
        (row["class"], row["clips"], macs(row["macs_per_clip"]), *(percent(row[p]) for p in points)) for row in shown
    ]
    title = "Mix of points, % of clips" + (
        "" if len(shown) == len(by_cost) else " (the costliest and cheapest classes)"
    )
    print_table(title, ("class", "clips", "MACs/clip", *points), [overall, *lines])
    say("files: " + ", ".join(str(Path(name)) for name in report["files"]))


def print_predictions(result: dict[str, Any]) -> None:
    """One line per video."""
    rows = [
        (
            Path(p["path"]).name,
            ", ".join(f"{name} {share:.2f}" for name, share in zip(p["classes"], p["probabilities"], strict=True)),
            " ".join(p["points"]),
            macs(p["macs"]),
        )
        for p in result["predictions"]
    ]
    if rows:
        print_table(f"Policy {result['policy']}", ("video", "classes, probability", "point", "MACs"), rows)

"""Prints the results of the verbs as tables and sentences.

The input is the result of a stage, with the keys of its JSON file, or the dataclass that a function returns. Tables go
to stdout, sentences to stderr: `videoadapt VERB > file` keeps the tables alone.
"""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videoadapt.commands.speed_table import print_speed
from videoadapt.errors import few, plural
from videoadapt.runtime.console import (
    duration,
    in_points,
    macs,
    percent,
    percent_interval,
    print_table,
    say,
    signed_points,
)
from videoadapt.runtime.files import Summary

if TYPE_CHECKING:
    # importing these takes seconds, and a verb needs one of them at most
    from videoadapt.commands.demo import DemoResult
    from videoadapt.commands.launch import LaunchPlan, LaunchResult
    from videoadapt.config.reference import SectionKeys
    from videoadapt.data.index.check import CheckResult
    from videoadapt.exporting.export import ExportSummary
    from videoadapt.reporting.page import ReportSummary

_TEXT_WIDTH = 100  # columns of a text; longer lines are harder to read
# Limits that keep a result on one screen
_FAILURES_SHOWN = 5
_HARDEST_SHOWN, _NAME_LENGTH = 3, 32  # classes in a line, and the characters of a name in it
_CAUSES_SHOWN = 4
_COUNTED = 6  # classes and points of many predictions
_EXAMPLES_SHOWN = 2
_MANY_CLASSES = 10  # up to as many, top-5 is left out of tables
_STILL = 0.99  # a fit whose loss ends above this fraction of its first one stands still
_CLASSES_SHOWN = 20  # an even number: half of them the costliest, half the cheapest


def print_keys(sections: Sequence[SectionKeys]) -> None:
    """Prints keys of a config under their sections: `KEY = DEFAULT`, the values, and the description."""
    width = min(shutil.get_terminal_size().columns, _TEXT_WIDTH)
    for section in sections:
        print(textwrap.fill(f"{section.name}: {section.description}", width) + "\n")
        for key in section.keys:
            print(f"  {key.name} = {key.default}")
            for paragraph in (key.values, key.description):
                print(textwrap.fill(paragraph, width, initial_indent="      ", subsequent_indent="      "))
            print()


def print_index(summary: Summary) -> None:
    """Prints the population of a manifest: videos by split and status, then duplicates and leaks."""
    columns: tuple[str, ...] = ("split", "listed", "readable", "missing", "broken", "damaged", "classes")
    images = set(summary["readers"]) == {"image"}
    if not images:  # images have no duration
        columns = (*columns, "hours", "shortest / median / longest s")
    rows = [
        (
            name,
            # "ok" is shown as readable: it counts the damaged videos too, because most of their frames can be decoded.
            *(split[key] for key in ("listed", "ok", "missing", "broken", "damaged", "classes")),
            *_durations(split, images=images),
        )
        for name, split in summary["splits"].items()
    ]
    title = f"Manifest {summary['manifest']}, of {plural(summary['classes'], 'class')}"
    print_table(title, columns, rows)
    if summary["readers"] and not images:
        readers = ", ".join(f"{name} {count}" for name, count in summary["readers"].items())
        say(f"videos by exact reader: {readers}; decoded completely to find damage: {summary['verified']}")
    for kind, examples in summary["passed_over"].items():
        _say_examples(f"passed over, {kind}", examples)
    _say_examples("missing files", summary["missing"])
    _say_causes(summary["broken"])
    for cause in summary["unprobed"]:
        say(f"not probed, run `videoadapt index` again: {cause['count']}, {cause['cause']}: {cause['first'][0]}")
    _say_examples("damaged", summary["damaged"])
    duplicates, leaks = summary["duplicates"], summary["leaks"]
    _say_examples("listed twice, counted once", duplicates["listed_twice"])
    _say_examples("unused files, because another file has the same name", duplicates["further_files"])
    _say_examples("groups of files with the same content", duplicates["same_content"])
    _say_examples(
        "of these, groups with different classes, so that at least one label is wrong", duplicates["other_class"]
    )
    _say_examples("leaks between splits, the same video", leaks["same_id"])
    _say_examples("leaks between splits, clips of the same YouTube video", leaks["same_source"])
    _say_examples("leaks between splits, the same content", leaks["same_content"])
    if any(examples["count"] for examples in leaks.values()):
        say(
            "leaks count in the accuracy on val: remove these videos from one of the splits (the list, or the folder), "
            "before `train`"
        )
    if not any(examples["count"] for examples in (*duplicates.values(), *leaks.values())):
        say("no duplicates, and no leaks between splits")


def _durations(split: Mapping[str, Any], *, images: bool) -> tuple[str, ...]:
    """Returns the cells of the hours and lengths of a split; none for images."""
    if images:
        return ()
    lengths = " / ".join(f"{seconds:.1f}" for seconds in split["seconds"]) or "-"  # none is readable
    return f"{split['hours']:.2f}", lengths


def _say_examples(name: str, examples: Mapping[str, Any]) -> None:
    """Prints a count and its first examples; nothing for a count of 0."""
    if not examples["count"]:
        return
    more = f" (the first {_EXAMPLES_SHOWN}; index.json has more)" if examples["count"] > _EXAMPLES_SHOWN else ""
    say(f"{name}: {examples['count']}{more}")
    for item in examples["first"][:_EXAMPLES_SHOWN]:
        # An item is a path or a message, or a group of equal files, which goes on one line.
        say("  " + (item if isinstance(item, str) else "  =  ".join(item[:_EXAMPLES_SHOWN])))


def _say_causes(broken: Sequence[Mapping[str, Any]]) -> None:
    for cause in broken[:_CAUSES_SHOWN]:
        say(f"broken: {cause['count']} with the cause `{cause['cause']}`, for example {cause['first'][0]}")
    others = broken[_CAUSES_SHOWN:]
    if others:
        say(f"broken: {sum(cause['count'] for cause in others)} with {len(others)} other causes; see index.json")


def print_check(result: CheckResult) -> None:
    """Prints which files have changed since their manifest was made."""
    rows = [*result.changes.items(), ("unchanged", result.unchanged), ("listed", result.videos)]
    print_table("Check", (f"manifest {result.manifest}", "videos"), rows)
    for difference in result.differences[:_FAILURES_SHOWN]:
        cause = f": {difference.cause}" if difference.cause else ""
        say(f"  {difference.change}: {difference.path} ({difference.split}){cause}")
    _say_more(len(result.differences), "--json lists all")


def _say_more(count: int, where: str) -> None:
    """Prints how many of `count` items are not shown."""
    if count > _FAILURES_SHOWN:
        say(f"  and {count - _FAILURES_SHOWN} more; {where}")


def print_train(summary: Summary) -> None:
    """Prints loss and top-1 of each point in the last epoch, and in the last validation."""
    validation, best = summary.get("validation"), summary.get("best")
    rows = []
    for point, v in summary["points"].items():
        # Sampled training (`train.draw`) can leave a point out of a whole epoch; it has no loss then.
        trained = (f"{v['loss']:.3f}", percent(v["top1"])) if v["loss"] is not None else ("not drawn", "-")
        rows.append((point, *trained, *(_validated_cells(validation["values"], point) if validation else ())))
    columns: tuple[str, ...] = ("point", "training loss", "top-1 %")
    title = "Last epoch, on the training clips"
    if validation:
        columns += ("validation loss", "validation top-1 %", "validation top-5 %")
        title += f", and on {plural(validation['read'], 'video')} of {validation['videos']}"
        if all(row[-1] == "-" for row in rows):  # five classes or fewer
            columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(title, columns, rows)
    if validation:
        say(
            "the training loss includes smoothing and class weights, and distillation at all points but the costliest; "
            "the validation loss has none of them. Never compare training losses of two points, or with those of "
            "validation"
        )
    say(
        f"{plural(summary['steps'], 'step')}; {summary['clips_per_s']:.1f} clips/s, "
        f"{summary['wait_fraction']:.0%} of the time waiting for data; {plural(summary['skipped'], 'clip')} skipped; "
        f"checkpoint {summary['checkpoint']}"
    )
    if best:
        early = "stopped early (train.patience); " if summary["stopped_early"] else ""
        say(
            f"{early}validations took {duration(summary['validation_s'])}; the best checkpoint by {best['metric']} "
            f"({best['value']:.3f}) is that of epoch {best['epoch']}"
            + (", the last one" if best["step"] == summary["steps"] else ": run.checkpoint=best selects it")
        )


def _validated_cells(values: Mapping[str, float | None], point: str) -> tuple[str, str, str]:
    """Returns loss, top-1 and top-5 of a point; `-` for a value that does not exist, or is not finite."""
    loss, top1, top5 = (values.get(f"{name}/{point}") for name in ("loss", "top1", "top5"))
    return (
        "-" if loss is None else f"{loss:.3f}",
        "-" if top1 is None else percent(top1),
        "-" if top5 is None else percent(top5),
    )


def print_label(summary: Summary) -> None:
    """Prints the accuracy of each point, and how many clips have it as their label."""
    total = summary["clips"]
    rows = [
        (point, percent(v["right"]), v["labelled"], percent(v["labelled"] / total))
        for point, v in summary["points"].items()
    ]
    title = f"Labels of {plural(total, 'clip')}, source {summary['source']}"
    print_table(title, ("point", "right %", "labelled", "labelled %"), rows)
    clips = plural(summary["none_right_clips"], "clip")
    say(f"no point is right on {clips} (label.none_right: {summary['none_right']})")
    for failure in summary["failed"][:_FAILURES_SHOWN]:
        say(f"  not labelled: {failure['path']}: {failure['cause']}")
    _say_more(len(summary["failed"]), "see label.json")


def print_assign(summary: Summary) -> None:
    """Prints accuracy and cost of the assigner on the clips that selected its threshold."""
    mix = ", ".join(f"{point}: {percent(v)} %" for point, v in summary["mix"].items())
    if next(iter(summary["mix"].values())) == 1:  # an interval would suggest that other clips may differ
        points_lost = "0: every clip gets the costliest point"
    else:
        points_lost = signed_points(summary["difference"])
    accuracy = f"{percent(summary['accuracy'])} / {percent(summary['accuracy_costliest'])}"
    cost = f"{macs(summary['assigner_macs'])} MACs, {100 * summary['assigner_fraction']:.2f} % of the costliest point"
    rows = [
        ("clips: fitted / selecting", f"{summary['clips_fitted']} / {summary['clips_selecting']}"),
        ("threshold", "none" if summary["rule"] == "none" else f"{summary['threshold']:.3f}, {summary['rule']}"),
        ("tells easy clips from hard ones: AUC (95 %)", "{:.2f} ({:.2f} to {:.2f})".format(*summary["auc"])),
        ("accuracy: assigned / costliest %", accuracy),
        ("difference in points (95 %)", points_lost),
        ("MACs saved %", percent(summary["macs_saved"])),
        ("mix", mix),
        ("cost of the assigner per clip", cost),
    ]
    print_table("Assigner", ("on the clips that selected its threshold", ""), rows)
    for sentence in _assigner_in_words(summary):
        say(sentence)


def _assigner_in_words(summary: Summary) -> list[str]:
    """Returns what the selecting clips prove about an assigner, and what one point for all clips would do."""
    clips, confidence = plural(summary["clips_selecting"], "clip"), percent(summary["confidence"])
    at_most = f"with confidence {confidence} % it loses at most {percent(summary['loss_at_most'])} points"
    needed = summary["clips_needed"]
    could = (
        f"about {needed} clips with as many of each source can prove assign.tolerance"
        if needed
        else "no number of clips proves a tolerance of 0"
    )
    one = f"{100 / summary['clips_selecting']:.2g} points"
    trained_on = ", on which the model was trained: new clips may lose more" if summary["source"] == "train" else ""
    found = {
        "proven": f"the threshold is proven on {clips}: {at_most}{trained_on}",
        "estimated": (
            f"the threshold is an estimate from {clips}, one of which is {one}, and no guarantee: {at_most}; {could}; "
            "`videoadapt calibrate` chooses with a guarantee"
        ),
        "none": (
            f"the assigner saves nothing: {clips}, one of which is {one}, support no cheaper mix within "
            f"assign.tolerance; {could}. Label more clips, allow a larger loss, use one point for all clips, or a "
            f"leap, which needs fewer labels: `evaluate --policy {advised_leap(summary)}`"
        ),
    }
    sentences = [found[summary["rule"]]]
    if summary["auc"][1] <= 0.5:  # noqa: PLR2004 - of guessing
        sentences.append("the assigner is not proven to tell easy clips from hard ones better than guessing")
    first, last = summary["loss_first"], summary["loss_last"]
    if first is not None and last > _STILL * first:
        sentences.append(
            f"the loss stands still: {first:.3g} in the first epoch, {last:.3g} in the last, so the assigner may have "
            "learnt nothing: raise assign.epochs, change assign.lr, or label more clips"
        )
    used = [point for point, fraction in summary["mix"].items() if fraction > 0]
    if len(used) == 1 and summary["rule"] != "none":
        sentences.append(f"every clip gets point {used[0]}: policy fixed:{used[0]} does the same without an assigner")
    for point, fixed in summary["fixed"].items():
        sentences.append(
            f"fixed:{point} for all clips: saves {percent(fixed['macs_saved'])} %, {in_points(fixed['difference'])}; "
            f"chance alone differs so with probability {fixed['p_value']:.2g}"
        )
    return sentences


def advised_leap(summary: Summary) -> str | None:
    """Returns the policy to try where `assign` found no threshold; None where it found one."""
    return f"leap:{list(summary['mix'])[-1]}:price=0.05" if summary["rule"] == "none" else None


def print_calibrate(summary: Summary) -> None:
    """Prints the chosen policy beside the fixed points, or how many videos a choice needs."""
    curve = {point["policy"]: point for point in summary["curve"]}
    fixed = [name for name in curve if name.startswith("fixed:")]
    chosen = summary["chosen"]
    rows = [
        (
            name + " (chosen)" * (name == chosen),
            percent(point["accuracy"]),
            f"{percent(point['loss'])} (to {percent(point['loss_upper'])})",
            f"{percent(point['cost'])} (to {percent(point['cost_upper'])})",
            "yes" if point["valid"] else "no",
        )
        for name, point in curve.items()
        if name in {*fixed, chosen}
    ]
    confidence = percent(1 - summary["delta"])
    columns = ("policy", "top-1 %", f"loss % (to, {confidence} %)", f"cost % (to, {confidence} %)", "keeps the promise")
    videos = plural(summary["videos"], "video")
    if summary["sources"] is not None:
        videos += f" from {plural(summary['sources'], 'source')}"
    print_table(f"{videos} of the split calibrate; loss and cost against fixed:{summary['costliest']}", columns, rows)
    say(f"promise: {summary['promise']}; orders by {summary['ordered_by']}")
    if chosen is None:
        say(_no_policy(summary, videos))
    else:
        best, times = curve.get(summary["best_fixed"]), summary["ms_estimate"]
        beside = (
            f"the cheapest fixed point that keeps the promise, {best['policy']}, saves {percent(1 - best['cost'])} %"
            if best
            else "no fixed point keeps the promise"
        )
        say(f"chosen: {chosen}, which saves {percent(1 - curve[chosen]['cost'])} % of the MACs; {beside}")
        if times:
            say(
                "time of a clip, an estimate from the speeds of the fixed points and no promise: "
                f"{times[chosen]:.3g} ms, at the costliest point {times['fixed:' + summary['costliest']]:.3g} ms"
            )
    for failure in summary["failed"][:_FAILURES_SHOWN]:
        say(f"left out: {failure['path']}: {failure['cause']}")
    _say_more(len(summary["failed"]), "see calibrate/calibrate.json")


def _no_policy(summary: Summary, videos: str) -> str:
    """Returns in words that no policy keeps the promise, and what would help."""
    if summary["max_cost"] is not None:
        return f"no policy keeps this promise with {videos}: raise calibrate.cost or calibrate.delta"
    if summary["needed"] is None:
        return (
            f"no policy keeps this promise with {videos}, and more of them would not help: even the safest policies "
            "lose more; raise calibrate.eps"
        )
    needed = str(summary["needed"]) if summary["sources"] is None else plural(summary["needed"], "source")
    return (
        f"no policy keeps this promise with {videos}; that takes about {needed}: raise "
        "data.calibrate (and train again), calibrate.eps or calibrate.delta"
    )


def print_evaluate(summary: Summary) -> None:
    """Prints one row per policy (accuracy with intervals, cost, speed), then failures and notes."""
    failed_count_as_wrong = summary["failed_count_as"] == "wrong"
    # If videos failed, a second top-1 shows the result of counting them in the other way.
    other = ("readable only", "top1_readable") if failed_count_as_wrong else ("failed as wrong", "top1_failed_wrong")
    other_column, other_key = other if summary["failed"] else (None, None)
    columns = (
        "policy",
        "top-1 % (95 %)",
        *((other_column,) if other_column else ()),  # as in `_policy_cells`
        "to costliest",
        "top-5 %",
        "mean class %",
        "MACs/view",
        "MACs/video",
        "saved %",
        "clips/s",
    )
    noun = summary["kind"].removesuffix("s")
    title = f"{plural(summary['listed'], noun)} listed, {summary['scored']} read; each: {summary['views']}"
    rows = [_policy_cells(name, policy, other_key) for name, policy in summary["policies"].items()]
    columns, rows = _without_needless(columns, rows)
    if summary["classes"] <= _MANY_CLASSES and "top-5 %" in columns:  # nearly every answer is among the best five
        place = columns.index("top-5 %")
        columns, rows = columns[:place] + columns[place + 1 :], [row[:place] + row[place + 1 :] for row in rows]
    print_table(title, columns, rows)
    guessing = summary["largest_class_fraction"]
    no_better = [name for name, policy in summary["policies"].items() if policy["top1_low"] <= guessing]
    verdict = f"; not proven to be better: {few(no_better)}" if no_better else ""
    say(f"always answering with the largest class, {summary['largest_class']}: {percent(guessing)} %{verdict}")
    say(
        "* on the Pareto front by the measured values, whatever their intervals: none has a higher top-1 at no more "
        "MACs, or the same at fewer MACs; random and oracle take no part"
    )
    if "random" in summary["policies"]:
        say("random: the mix of points of assigned, by chance")
    if "oracle" in summary["policies"]:
        say(
            "oracle: the cheapest right point, chosen with the true class; with one clip a video, an upper bound for "
            "choosing points"
        )
    for name, promise in summary["promises"].items():
        say(f"{name} is calibrated: {promise}")
    _say_videos(summary)
    _say_nan(summary["policies"])
    _say_hardest_classes(summary)
    if "assigned" in summary["policies"]:
        _say_assigned(summary["policies"]["assigned"], summary["assigner_macs"])
    elif len(summary["macs_per_view"]) > 1:  # one point leaves nothing to assign
        say(
            "no assigner yet: `videoadapt label` and `videoadapt assign` add the policies assigned and random, if "
            "`data.holdout` kept clips for them (label.source=holdout). Cascades need neither"
        )
    _say_against_fixed(summary["policies"])
    say("MACs are multiply-adds (the FLOPs of the papers) and include the assigner")
    print_speed(summary["speed"])
    if summary["speed"] and (wanted := _busy()):
        say(f"the machine is busy ({wanted}): speeds are lower than alone on it, and their intervals wider")
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in summary["stages"].items())
    say(f"time, with what was kept from earlier calls: {times}")


def _say_videos(summary: Summary) -> None:
    """Prints what the videos of an evaluation are: their part in training, their sources, and those that failed."""
    if summary["selected_on_val"]:
        say(f"the checkpoint is {summary['selected_on_val']}, so its accuracy on this split is optimistic")
    counted = "wrong" if summary["failed_count_as"] == "wrong" else "left out (evaluate.failed: exclude)"
    failed = f"{plural(len(summary['failed']), 'video')} failed, counted as {counted}"
    if summary["sources"]:
        say(f"intervals draw whole sources, of which these videos have {summary['sources']}")
    say(f"manifest {summary['manifest']}; {failed if summary['failed'] else 'all videos could be read'}")
    for failure in summary["failed"][:_FAILURES_SHOWN]:
        say(f"  failed: {failure['path']}: {failure['cause']}")
    _say_more(len(summary["failed"]), "see evaluate.json")


def _without_needless(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns columns and rows without the columns that have no values, or those of another column."""
    cells = {name: [row[number] for row in rows] for number, name in enumerate(columns)}
    needless = {name for name, values in cells.items() if set(values) == {"-"}}
    if cells["MACs/view"] == cells["MACs/video"]:
        needless.add("MACs/view")
    kept = tuple(name for name in columns if name not in needless)
    return kept, [tuple(cells[name][number] for name in kept) for number in range(len(rows))]


def _policy_cells(name: str, policy: Mapping[str, Any], other_key: str | None) -> tuple[str, ...]:
    """Returns the cells of a policy's row; `other_key` names the second top-1, if there is one."""
    top1, mean_class = (
        percent_interval(policy[key], policy[f"{key}_low"], policy[f"{key}_high"]) for key in ("top1", "mean_class")
    )
    return (
        f"{name} *" if policy["pareto"] else name,  # a separate column would be too wide
        top1,
        *((percent(policy[other_key]),) if other_key else ()),
        # The interval is paired, over the same videos: it is narrower than the two intervals of top-1 suggest.
        signed_points(policy["difference_to_costliest"]),
        "-" if policy["top5"] is None else percent(policy["top5"]),  # none for five classes or fewer
        mean_class,
        macs(policy["macs_per_view"]),
        macs(policy["macs_per_video"]),
        percent(policy["macs_saved"]),
        # None: the speed was not measured, or the policy had no pass in time.
        "-" if policy["clips_per_s"] is None else f"{policy['clips_per_s']:.1f}",
    )


def _say_nan(policies: Mapping[str, Mapping[str, Any]]) -> None:
    counts = {name: row["nan_videos"] for name, row in policies.items() if row["nan_videos"]}
    if counts:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        say(
            f"NaN probabilities, counted as wrong, in videos: {shown}; the weights are finite, so an activation "
            "overflows: try run.precision=fp32"
        )


def _short(name: str) -> str:
    """Returns the name of a class, cut after `_NAME_LENGTH` characters."""
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 3]}..."


def _say_hardest_classes(summary: Summary) -> None:
    if not summary["hardest_classes"]:
        return
    hardest = ", ".join(
        f"{_short(row['class'])} {percent(row['top1'])} %"
        + (f" (most often predicted as {_short(row['taken_for'])})" if row["taken_for"] else "")
        for row in summary["hardest_classes"][:_HARDEST_SHOWN]
    )
    say(
        f"hardest classes of {summary['hardest_policy']}: {hardest}; all classes: evaluate/classes.csv; figure: "
        "evaluate/confusion.png"
    )


def _say_assigned(policy: Mapping[str, Any], assigner_macs: int) -> None:
    view, video = macs(policy["macs_per_view_without_assigner"]), macs(policy["macs_per_video_without_assigner"])
    say(
        f"assigned, without its assigner ({macs(assigner_macs)} MACs per clip): {view} MACs per view, {video} per video"
    )
    # The comparison that shows whether the assigner's choice matters, or only its mix of points.
    alone = [point for point, fraction in policy["mix"].items() if fraction == 1]
    if alone:
        say(f"assigned gives every clip the point {alone[0]}, as fixed:{alone[0]} does without an assigner")
    say(f"assigned against random routing with the same mix: {in_points(policy['difference_to_random'])}")


def _busy() -> str:
    from videoadapt.runtime.machine import busy  # it imports torch

    return busy()


def _say_against_fixed(policies: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints which fixed point could do for all clips, if fixed points do as well as each policy, and the best one."""
    from videoadapt.evaluation.against_fixed import proven_policy, sufficient_fixed, worth  # they import pandas
    from videoadapt.evaluation.evaluated import has_text, routing_policies

    if sufficient := sufficient_fixed(policies):
        row = policies[sufficient]
        say(
            f"{sufficient} is the cheapest fixed point that is not significantly less accurate than "
            f"{next(iter(policies))}: {in_points(row['difference_to_costliest'])}, {percent(row['macs_saved'])} % saved"
        )
    for name, policy in policies.items():
        if name.startswith("cascade:") and policy["macs_saved"] < 0:
            say(
                f"{name} costs more than the costliest point: at its threshold, too few clips stop early. A lower one "
                "stops more of them"
            )
        if "mixture" not in policy:
            continue
        mixture = " and ".join(f"{fraction:.0%} {point}" for point, fraction in policy["mixture"].items())
        say(f"{name} against {mixture}, by chance, at the same MACs: {in_points(policy['difference_to_mixture'])}")
        fixed = policy["cheaper_fixed"]
        if fixed is not None:
            cheaper = percent(1 - policies[fixed]["macs_per_video"] / policy["macs_per_video"])
            say(
                f"{fixed} costs {cheaper} % less than {name} and is not significantly less accurate: {name} minus "
                f"{fixed} {in_points(policy['difference_to_cheaper_fixed'])}"
            )
    if best := proven_policy(policies):
        tried = len(routing_policies(policies))
        among = f" It was chosen among {tried} on these videos." if tried > 1 else ""
        use = f" `videoadapt predict` takes --policy {best}" if has_text(best) else ""
        say(f"favoured is {best}: {worth(policies, best)}.{among}{use}")


def print_export(summary: ExportSummary) -> None:
    """Prints how far each exported graph differs from the model."""
    table = summary.table()
    print_table(table.title, table.columns, table.rows)


def print_compare(summary: Summary) -> None:
    """Prints one row per pair of policies: both accuracies, their paired difference, and its p-value."""
    rows = []
    for row in summary["policies"]:
        rows.append(
            (
                " / ".join(dict.fromkeys(row["policies"])),  # a policy that both sides share is named once
                *map(percent, row["top1"]),
                signed_points(row["difference"]),
                *row["right_in_one_only"],
                f"{row['p_value']:.2g}",
            )
        )
    a, b = summary["runs"]
    columns = ("policy", "A top-1 %", "B top-1 %", "A - B (95 %)", "right in A only", "right in B only", "p")
    print_table(f"A = {a}, B = {b}, on the {plural(summary['common'], 'video')} of both", columns, rows)
    failed = f"failed videos: {summary['failed_count_as']}"
    if summary["manifests"][0] == summary["manifests"][1]:
        # Equal manifests list the same videos. Their files can still differ, for example after a new encoding.
        files = "the same files" if summary["files"][0] == summary["files"][1] else "but OTHER FILES of these videos"
        say(f"the same manifest, {summary['manifests'][0]}, {files}; {failed}")
    else:
        listed = " and ".join(map(str, summary["listed"]))
        say(
            f"the manifests differ ({' and '.join(summary['manifests'])}; {listed} videos listed): only videos that "
            f"both list are compared; {failed}"
        )
    if None not in summary["views"] and summary["views"][0] != summary["views"][1]:
        say(f"THE VIEWS DIFFER: {' in A, '.join(summary['views'])} in B; part of a difference may be due to them")
    say(
        "p: exact two-sided McNemar test on the videos that one run alone gets right; it counts each of them, also of "
        "one source, and is not corrected for many policies"
    )


def print_report(summary: ReportSummary) -> None:
    """Prints the sentence of each run, and where the page is."""
    for run, sentence in zip(summary.runs, summary.sentences, strict=True):
        print(f"{run}: {sentence}" if len(summary.runs) > 1 else sentence)
    print(f"page: {summary.page} ({summary.bytes / 1e6:.1f} MB, {summary.seconds:.0f} s); open it in a browser")


def print_flops(summary: Summary) -> None:
    """Prints the MACs of every point by part; after an evaluation, also the MACs of clips, classes and policies."""
    rows = [
        (
            point["point"],
            *map(macs, point["parts"].values()),  # embedding, temporal, spatial, MLP, head
            macs(point["macs_per_view"]),
            macs(point["macs_per_video"]),
        )
        for point in summary["points"]
    ]
    columns = ("point", "embedding", "temporal", "spatial", "MLP", "head", "per view", "per video")
    title = f"MACs (multiply-adds; the FLOPs of the papers), {plural(summary['views_per_video'], 'view')} per video"
    print_table(title, columns, rows)
    if summary["assigner_macs"] is not None:  # None: with a single point there is nothing to assign
        fraction = summary["assigner_macs"] / summary["points"][0]["macs_per_view"]  # the first point is the costliest
        say(
            f"assigner: {macs(summary['assigner_macs'])} MACs per clip, "
            f"{100 * fraction:.2f} % of a view at the costliest point"
        )
    if "clips" in summary:  # the run has been evaluated
        _print_clips(summary["clips"])
        rows = [
            (
                p["policy"],
                macs(p["macs_per_clip"]),
                macs(p["macs_per_video"]),
                percent(p["top1"]),
                "*" * p["pareto"],
            )  # bool
            for p in sorted(summary["policies"], key=lambda p: -p["macs_per_clip"])
        ]
        print_table("Policies, costliest first", ("policy", "MACs/clip", "MACs/video", "top-1 %", "Pareto front"), rows)


def _print_clips(report: Mapping[str, Any]) -> None:
    """Prints the clip-level report: the distribution of costs, and the mix of points by class."""
    rows = [
        (name, *(macs(report[f"macs_per_{name}"][key]) for key in ("mean", "median", "p95")))
        for name in ("clip", "video")
    ]
    title = f"Measured costs, policy {report['policy']} (MACs, all crops)"
    print_table(title, ("per", "mean", "median", "95th %"), rows)
    points = list(report["mix"])
    # No counts in this row: the first table has the mean cost of all clips.
    overall = ("all", "", "", *map(percent, report["mix"].values()))
    classes = sorted(report["classes"], key=lambda row: -row["macs_per_clip"])
    title = "Mix of points, % of clips"
    # Kinetics has 400 classes: the ends of the list are the interesting ones, and classes.csv has the rest.
    if len(classes) > _CLASSES_SHOWN:
        classes = [*classes[: _CLASSES_SHOWN // 2], *classes[-_CLASSES_SHOWN // 2 :]]
        title += " (the costliest and cheapest classes)"
    lines = [
        (row["class"], row["clips"], macs(row["macs_per_clip"]), *(percent(row[point]) for point in points))
        for row in classes
    ]
    print_table(title, ("class", "clips", "MACs/clip", *points), [overall, *lines])
    alone = [point for point, fraction in report["mix"].items() if fraction == 1]
    if alone:
        say(f"every clip is at the point {alone[0]}, so the mix of points says nothing about the classes")
    say("files: " + ", ".join(report["files"]))


def print_predictions(result: Summary) -> None:
    """Prints one row per video: its most probable classes, the points of its clips, and its cost."""
    rows = [
        (
            Path(p["path"]).name,  # a whole path would leave no space for the classes
            ", ".join(f"{name} {value:.2f}" for name, value in zip(p["classes"], p["probabilities"], strict=True)),
            " ".join(p["points"]),  # one per clip of the video
            macs(p["macs"]),
        )
        for p in result["predictions"]
    ]
    if rows:  # no rows if every file failed; the error then names the files
        print_table(f"Policy {result['policy']}", ("video", "classes, probability", "point", "MACs"), rows)
    if len(rows) > 1:
        mean = macs(sum(p["macs"] for p in result["predictions"]) / len(rows))
        classes, points = (
            ", ".join(f"{name} {count}" for name, count in counts.most_common(_COUNTED))
            for counts in (
                Counter(p["classes"][0] for p in result["predictions"]),
                Counter(point for p in result["predictions"] for point in p["points"]),
            )
        )
        say(f"{len(rows)} files, {mean} MACs each on average; clips by point: {points}; first answers: {classes}")
    if result["left_out"]:
        say(f"left out, because they are no videos or cannot be listed: {few(result['left_out'])}")


def print_launch(result: LaunchResult) -> None:
    """Prints the jobs with their ids and log files, then the sbatch commands that submit the same jobs."""
    rows = [(job.stage, job.id, job.ranks, job.shards, job.log) for job in result.jobs]
    print_table("Jobs", ("stage", "id", "ranks", "shards", "log"), rows)
    for job in result.jobs:
        if job.sbatch:
            print(job.sbatch)  # not wrapped, so that it can be copied


def print_launch_plan(plan: LaunchPlan) -> None:
    """Prints the jobs of a dry run with their options, the scripts, and commands that submit equal jobs by hand."""
    hidden = {"job-name", "output", "open-mode", "dependency", "kill-on-invalid-dep", "signal", "requeue"}
    rows = [
        (
            job.name,
            job.stage,
            job.after or "-",
            job.ranks,
            job.shards,
            " ".join(f"{name}={value}" if value else name for name, value in job.options.items() if name not in hidden),
        )
        for job in plan.jobs
    ]
    print_table("Jobs, not submitted", ("job", "stage", "after", "ranks", "shards", "resources"), rows)
    for job in plan.jobs:  # not wrapped, so that it can be copied
        print(f"# {job.name}, {job.stage}: the script that sbatch gets\n{job.script}")
    print(f"# Equal jobs by hand\nmkdir -p {shlex.quote(plan.folder)}")
    for job in plan.jobs:
        print(f"{job.name}=$({job.sbatch.replace('sbatch', 'sbatch --parsable', 1)}\n)")


def print_demo(result: DemoResult) -> None:
    """Prints costs, policies, accuracy by level of difficulty, and the time of each stage."""
    print_flops(result.costs)  # the cost of a point, before its accuracy
    print_evaluate(result.evaluation)
    print_calibrate(result.calibration)
    summary = result.summary
    policies = list(summary.policies)
    rows = [
        # The table holds floats; `videos` is a count.
        (level, int(row["videos"]), percent(row["mean_cost"]), *(percent(row[policy]) for policy in policies))
        for level, row in summary.levels.items()
    ]
    columns = ("level", "videos", "MACs %", *policies)
    print_table(
        "By level of difficulty: mean MACs of the assigned points, in % of the costliest; top-1 %", columns, rows
    )
    say("Each level (stripe period and contrast) was designed to need more tokens than the level before it.")
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary.stages.items())
    say(f"{summary.seconds:.0f} s in total ({stages}); see {result.folder / 'summary.json'}")
    say(f"Open in a browser: {result.folder / 'report' / 'report.html'}")

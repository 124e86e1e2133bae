"""The config that a run folder keeps: `run.dir/config.yaml`. Commands accept the folder in place of a config.

It is the config of the model that the folder holds. `train` writes it, and so does `index` as long as there is no
checkpoint. Later stages do not change what `train` has recorded. `label` and `assign` replace their own section,
because later stages need the files that these settings made. `evaluate` changes nothing, because it can be run in many
ways. A stage that finds no config writes its own. A `config.yaml` that a person has written is never changed.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from videoadapt.config.load import (
    RUN_CONFIG,
    RUN_MARK,
    Config,
    dump_config,
    is_recorded,
    load_config,
    make_config,
    with_absolute_paths,
)
from videoadapt.config.sections import LaunchConfig
from videoadapt.errors import ConfigError
from videoadapt.runtime.console import say
from videoadapt.runtime.files import replacing

_PARTS_OF_TRAIN = ("holdout", "calibrate", "source_pattern")  # keys of `data` that decide which videos are trained on


def run_name(run: Path) -> str:
    """Returns the name of a run folder; of `DIR/run`, as `new` names all of them, that of DIR."""
    folder = run.resolve()
    return folder.parent.name if folder.name == "run" and folder.parent.name else folder.name


def record_config(config: Config, sections: Collection[str] | None = None) -> None:
    """Writes a config into its run folder, with absolute paths and without what belongs to one job alone.

    Prints a message, and writes nothing, if the new sections do not fit the recorded ones, or if a person has written
    the file.

    Args:
        config: The config of the stage.
        sections: The sections that replace those of a config that is already there. None: all.
    """
    path = config.run.dir / RUN_CONFIG
    if path.exists() and not is_recorded(path):
        say(f"{path}: written by hand, so it is not changed; later commands need the same overrides as this one")
        return
    try:
        recorded = _for_any_job(config)
        if sections is not None and path.exists():
            before, own = with_absolute_paths(load_config(config.run.dir)), recorded.model_dump(mode="json")
            recorded = make_config(before.model_dump(mode="json") | {name: own[name] for name in sections})
    except ConfigError as error:
        say(f"{path}: not changed ({error}); later commands need the same overrides as this one")
        return
    text = RUN_MARK + dump_config(recorded)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def say_other_parts(config: Config, stage: str) -> None:
    """Prints which keys divide the train split otherwise than `train` did, and how to get its keys."""
    path = config.run.dir / RUN_CONFIG
    try:
        trained = load_config(config.run.dir).data if path.exists() and is_recorded(path) else config.data
    except ConfigError:  # of another version
        return
    found = [
        f"data.{key} {getattr(trained, key)} (here {getattr(config.data, key)})"
        for key in _PARTS_OF_TRAIN
        if getattr(trained, key) != getattr(config.data, key)
    ]
    if found:
        say(
            f"{config.run.dir} was trained with {', '.join(found)}; `videoadapt {stage} {config.run.dir}` uses the "
            "keys of its training"
        )


def _for_any_job(config: Config) -> Config:
    """Returns the config without what belongs to the present job: ranks, shard, and what `launch` was to start."""
    parallel = config.parallel.model_copy(update={"ranks": None, "shard": None})
    return with_absolute_paths(config.model_copy(update={"parallel": parallel, "launch": LaunchConfig()}))

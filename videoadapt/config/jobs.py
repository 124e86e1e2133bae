"""The section `slurm`: the options of a SLURM job, and those that differ for a stage."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from videoadapt.config.sections import Count, Section
from videoadapt.errors import ConfigError, plural

Stage = Literal["train", "label", "assign", "calibrate", "evaluate"]
MailType = Literal[
    "NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "TIME_LIMIT", "TIME_LIMIT_90",
    "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS",
]  # fmt: skip

# As sbatch writes times: MIN, MIN:SEC, HOURS:MIN:SEC, DAYS-HOURS, DAYS-HOURS:MIN, DAYS-HOURS:MIN:SEC.
_SLURM_TIME = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<first>\d{1,7})(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?")
# SLURM's resources. A type may begin with a digit, such as 3g.20gb of a divided GPU.
_GRES = r"[A-Za-z_]\w*(:[\w.+-]+){0,2}(,[A-Za-z_]\w*(:[\w.+-]+){0,2})*"
_GPUS_PER_NODE = r"([\w.+-]+:)?[1-9]\d{0,3}(,([\w.+-]+:)?[1-9]\d{0,3})*"
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029]")
_GPU_KEYS = ("gpus_per_task", "gpus_per_node", "gres")
# Options of sbatch whose names differ from the keys of `slurm`, and those that no key can change.
_SBATCH_NAMES = {
    "mail": "mail-user",
    "time_minutes": "time",
    "tasks_per_node": "ntasks-per-node",
    "mem_gb": "mem",
    "signal_s": "signal",
}
_SET_BY_LAUNCH = (
    "job-name", "output", "error", "open-mode", "requeue", "no-requeue", "array", "dependency", "kill-on-invalid-dep",
    "parsable", "wrap", "wait", "test-only", "chdir",
)  # fmt: skip
# What people may write for values that a validator brings into the form of the type; for editors and the reference.
_TIME_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "integer", "minimum": 1, "maximum": 1_000_000}, {"type": "string", "pattern": r"^\d[\d:-]*$"}]
}
_MAIL_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "array", "items": {"type": "string", "enum": list(get_args(MailType))}}, {"type": "string"}]
}
# What may be written, for editors: a value need not be text.
_EXTRA_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null")]},
}
_ASSIGN_MINUTES = 240  # the assigner is a small network on small frames


def _slurm_minutes(value: Any) -> Any:
    """Returns the minutes of a time as sbatch writes it, rounded up as SLURM does; other values unchanged."""
    match = _SLURM_TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match or (match["third"] is None and match["days"] is None and match["second"] is None):
        return value  # minutes
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    if match["days"] is not None or match["third"] is not None:
        return math.ceil(int(match["days"] or 0) * 1440 + first * 60 + second + third / 60)
    return math.ceil(first + second / 60)


def _host_list(value: Any) -> Any:
    """Returns `n01,n02` for `[n01, n02]`, a YAML list. SLURM's own brackets stand behind a name: `n[01-02]`."""
    listed = re.fullmatch(r"\[\s*([A-Za-z].*)\]", value) if isinstance(value, str) else None
    return re.sub(r"\s+", "", listed[1]) if listed else value


def _written_as(pattern: str, expected: str) -> AfterValidator:
    """Returns a check of a text whose message says what was expected, instead of the pattern."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise PydanticCustomError("text", "expected " + expected)
        return value

    return AfterValidator(check)


def _one_line(value: str) -> str:
    """Returns the text without space around it. A line break, as after `|` in YAML, would end its line in a script."""
    if _CONTROL.search(text := value.strip()):
        raise PydanticCustomError("text", "expected one line without control characters")
    return text


Line = Annotated[str, AfterValidator(_one_line)]


def _mail_types(value: Any) -> Any:
    """Splits `END,fail` as sbatch does; other values unchanged."""
    return [each.strip().upper() for each in value.split(",")] if isinstance(value, str) else value


def _extra_options(value: Any) -> Any:
    """Checks the names of options of sbatch, and returns their values as text: empty for true, None for false."""
    if not isinstance(value, dict):
        return value
    options: dict[str, Any] = {}
    for key, each in value.items():
        name = str(key).replace("_", "-")
        _require_free(name)
        word = str(each).lower()
        if word in ("true", "yes", "on"):
            options[name] = ""
        elif word in ("false", "no", "off"):
            options[name] = None
        else:
            options[name] = str(each) if isinstance(each, (int, float)) else each
    return options


def _require_free(name: str) -> None:
    """Raises an error for an option of sbatch that has a key of its own, or that videoadapt sets."""
    if not re.fullmatch("[a-z][a-z0-9-]+", name):
        raise PydanticCustomError(
            "option", "expected long names of sbatch's options without dashes before them, such as nodelist"
        )
    for key in JobConfig.model_fields.keys() - {"extra", "setup", "srun", "python", "max_restarts"}:
        # sbatch accepts the beginning of a name for the name.
        if _sbatch_name(key).startswith(name):
            raise PydanticCustomError("option", f"--{name} has a key of its own, slurm.{key}")
    if any(option.startswith(name) for option in _SET_BY_LAUNCH):
        raise PydanticCustomError("option", f"--{name} is set by videoadapt launch")


def _sbatch_name(key: str) -> str:
    """Returns the name of the option of sbatch that a key of `slurm` sets."""
    return _SBATCH_NAMES.get(key, key.replace("_", "-"))


def _resources(text: str | None) -> list[str]:
    return text.split(",") if text else []


def _is_gpu(resource: str) -> bool:
    """Returns whether a resource of `gres` is a GPU."""
    return resource.split(":")[0] == "gpu"


def _count(resource: str) -> int:
    """Returns 4 for `gpu:a100:4`, for `a100:4` and for `4`; 1 if there is no count."""
    count = resource.rpartition(":")[2]
    return int(count) if count.isdigit() else 1


def _part(resource: str, tasks: int) -> str:
    """Returns the GPUs of one of several tasks: `gpu:a100:1` for one of four with `gpu:a100:4`."""
    name, colon, count = resource.rpartition(":")
    return f"{name}{colon}{max(1, int(count) // tasks)}" if count.isdigit() else resource


class JobConfig(Section):
    """The options of a SLURM job. An option that is null is not given to sbatch: the cluster's default holds."""

    partition: Line | None = None
    """`--partition` of sbatch."""
    account: Line | None = None
    """`--account` of sbatch: who pays."""
    qos: Line | None = None
    """`--qos` of sbatch."""
    reservation: Line | None = None
    """`--reservation` of sbatch: nodes that are reserved for you, such as for a course."""
    wckey: Line | None = None
    """`--wckey` of sbatch: a name for the accounting."""
    constraint: Line | None = None
    """Required features of the nodes (`--constraint`)."""
    exclude: Annotated[Line, BeforeValidator(_host_list)] | None = None
    """Names of nodes to avoid (`--exclude`), such as `n01,n02` or `n[01-03]`."""
    licenses: Line | None = None
    """`--licenses` of sbatch, such as `matlab:2`."""
    comment: Line | None = None
    """Text that SLURM keeps with the job (`--comment`)."""
    mail: Annotated[Line, _written_as(r"\S+", "one address")] | None = None
    """Address that SLURM writes to (`--mail-user`). null = no mail."""
    mail_type: Annotated[tuple[MailType, ...], BeforeValidator(_mail_types), WithJsonSchema(_MAIL_SCHEMA)] = (
        "END",
        "FAIL",
    )
    """Events that SLURM writes to `mail` about (`--mail-type`), such as `END,FAIL,REQUEUE`."""
    time_minutes: Annotated[Count, BeforeValidator(_slurm_minutes), WithJsonSchema(_TIME_SCHEMA)] = 1440
    """Limit of one start (`--time`); shortly before it, the job saves and is requeued. A number is minutes; or a time
    as sbatch writes it, such as 4:00:00 or 1-12."""
    nodes: Count = 1
    """Nodes of a job (`--nodes`)."""
    tasks_per_node: Count = 1
    """Ranks on each node (`--ntasks-per-node`), one for each GPU."""
    gpus_per_task: Annotated[int, Field(ge=0, le=1)] | None = None
    """GPUs that SLURM binds to a rank, one at most (`--gpus-per-task`): NCCL then has no fast path to the node's other
    GPUs. 0 = no GPUs. null = one for each task by `--gpus-per-node`, unless `gpus_per_node` or `gres` asks for GPUs;
    only one of these three keys may."""
    gpus_per_node: Annotated[Line, _written_as(_GPUS_PER_NODE, "[TYPE:]COUNT, such as 4 or a100:4")] | None = None
    """GPUs of each node (`--gpus-per-node`), such as `4` or `a100:4`: one for each task, or more."""
    gres: Annotated[Line, _written_as(_GRES, "NAME[:TYPE][:COUNT], such as gpu:a100:4")] | None = None
    """Generic resources of each node (`--gres`), such as `gpu:a100:4` or `gpu:4,lscratch:100`."""
    gpu_bind: Annotated[Line, _written_as(r"\S+", "a binding of sbatch, such as single:1")] | None = None
    """The GPUs that each task sees (`--gpu-bind`), such as `single:1`. null = all of the job's on its node, unless
    `gpus_per_task` is 1. `none` leaves `CUDA_VISIBLE_DEVICES` out: only for nodes whose GPUs are all yours."""
    cpus_per_task: Count = 8
    """CPUs of a rank (`--cpus-per-task`). The data workers of a task share them."""
    mem_gb: Count | None = None
    """Memory of each node in GB (`--mem`)."""
    extra: Annotated[dict[str, Line | None], BeforeValidator(_extra_options), WithJsonSchema(_EXTRA_SCHEMA)] = {}
    """Further options of sbatch by their long names, such as {exclusive: true, nodelist: n07, mem-per-gpu: 32G}. true =
    an option without a value; false = not given."""
    setup: tuple[str, ...] = ()
    """Shell lines before the command, to load modules or an environment."""
    srun: tuple[str, ...] = ()
    """Further options of srun, such as --container-image=video.sqsh or --cpu-bind=none."""
    python: Line | None = None
    """Command that starts Python in a job, such as `apptainer exec --nv video.sif python`. null = this Python."""
    signal_s: Annotated[int, Field(ge=1, le=65_535)] = 120
    """Seconds before the time limit at which the job gets the signal to save (`--signal`)."""
    max_restarts: Annotated[int, Field(ge=0, le=1_000_000)] = 20
    """Times that a job may be requeued. A job that needs more fails."""

    @property
    def gpus_on_node(self) -> int:
        """Number of GPUs of each node that `gpus_per_node` or `gres` asks for; 0 if neither asks."""
        return sum(map(_count, [*_resources(self.gpus_per_node), *filter(_is_gpu, _resources(self.gres))]))

    @property
    def asks_by_default(self) -> bool:
        """Whether no key asks for GPUs: each task then uses one of the node's, and NCCL sees them all."""
        return self.gpus_per_task is None and not self.gpus_on_node

    @property
    def gpus_for_tasks(self) -> int:
        """Number of GPUs on each node, of which each task uses one; 0 without GPUs."""
        return self.gpus_on_node or self.tasks_per_node * (1 if self.gpus_per_task is None else self.gpus_per_task)

    def one_task(self) -> JobConfig:
        """Returns the options of a job with one task only: its part of the GPUs and of the memory of a node."""
        tasks = self.tasks_per_node
        gpus = [_part(resource, tasks) for resource in _resources(self.gpus_per_node)]
        gres = [_part(each, tasks) if _is_gpu(each) else each for each in _resources(self.gres)]
        return self.model_copy(
            update={
                "nodes": 1,
                "tasks_per_node": 1,
                "mem_gb": self.mem_gb and math.ceil(self.mem_gb / tasks),
                "gpus_per_node": ",".join(gpus) or None,
                "gres": ",".join(gres) or None,
            }
        )

    def check(self, section: str) -> None:
        """Checks that one key asks for GPUs, and for enough, and that the signal to save comes in time.

        Args:
            section: The name of these options, for the message.

        Raises:
            ConfigError: Several keys ask, tasks have no GPU, or the signal comes before the job.
        """
        if self.signal_s >= 60 * self.time_minutes:
            raise ConfigError(
                f"{section}.signal_s: {self.signal_s} s before the limit of {plural(self.time_minutes, 'minute')} "
                "(time_minutes), the job has not begun; lower it, or raise the limit"
            )
        if any(_is_gpu(each) and not _count(each) for each in _resources(self.gres)):
            raise ConfigError(f"{section}.gres: {self.gres} asks for no GPU; leave gpu out and set gpus_per_task=0")
        given = {key: getattr(self, key) for key in _GPU_KEYS if getattr(self, key) is not None}
        if not any(map(_is_gpu, _resources(self.gres))):
            given.pop("gres", None)
        if len(given) > 1:
            keys = " and ".join(f"{section}.{key}" for key in given)
            raise ConfigError(f"{keys}: each asks for the GPUs of the job; keep one of them")
        if 0 < self.gpus_on_node < self.tasks_per_node:
            [(key, value)] = given.items()
            raise ConfigError(
                f"{section}.{key}: {value} has too few GPUs for the {self.tasks_per_node} tasks of a node "
                "(tasks_per_node); each needs one"
            )


class StageConfig(JobConfig):
    """Keys of `slurm` that differ for one stage. Only keys that are given have an effect."""

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are given, with their values."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}

    @model_serializer(mode="wrap")
    def _only_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key in self.model_fields_set}


class StagesConfig(Section):
    """Keys of `slurm` that differ for a stage, such as `slurm.stages.assign.time_minutes: 30`."""

    train: StageConfig = StageConfig()
    """Keys of `slurm` for the job of train."""
    label: StageConfig = StageConfig()
    """Keys of `slurm` for the jobs of label."""
    assign: StageConfig = StageConfig()
    """Keys of `slurm` for the job of assign, which has one task. It takes `slurm.time_minutes`, but 240 minutes at
    most, if it has no time of its own."""
    calibrate: StageConfig = StageConfig()
    """Keys of `slurm` for the jobs of calibrate."""
    evaluate: StageConfig = StageConfig()
    """Keys of `slurm` for the jobs of evaluate."""

    @model_serializer(mode="wrap")
    def _only_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {stage: keys for stage, keys in serialize(self).items() if keys}


class SlurmConfig(JobConfig):
    """Resources of a SLURM job. `assign`, and each job of an array, has one task with its GPUs, CPUs and memory."""

    stages: StagesConfig = StagesConfig()
    """Keys of this section that differ for a stage: `slurm.stages.STAGE.KEY`."""

    @model_validator(mode="after")
    def _check_jobs(self) -> SlurmConfig:
        self.check("slurm")
        for stage in get_args(Stage):
            self.of(stage).check(f"slurm.stages.{stage}")
        if several := {"nodes", "tasks_per_node"} & self.stages.assign.given.keys():
            raise ConfigError(f"slurm.stages.assign.{min(several)}: assign has one task; leave this key out")
        return self

    def of(self, stage: Stage) -> JobConfig:
        """Returns the options of the job of a stage."""
        options = JobConfig.model_construct(**{key: getattr(self, key) for key in JobConfig.model_fields})
        given = getattr(self.stages, stage).given
        if stage == "assign":
            minutes = min(self.time_minutes, _ASSIGN_MINUTES)
            options = options.one_task().model_copy(update={"time_minutes": minutes})
        if not given.keys().isdisjoint(_GPU_KEYS):  # the stage asks for GPUs in its own way
            others = ",".join(each for each in _resources(options.gres) if not _is_gpu(each))
            options = options.model_copy(update=dict.fromkeys(_GPU_KEYS) | {"gres": others or None})
        if "extra" in given:
            given["extra"] = options.extra | given["extra"]
        return options.model_copy(update=given)

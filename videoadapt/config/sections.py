"""The sections of a config: what each key means, its default, and what it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from videoadapt.config.cost import point_cost
from videoadapt.config.points import Point
from videoadapt.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]

_RAND_AUGMENT = r"^rand(-(m\d+|n\d+|(p|mstd)\d+(\.\d+)?))*-inc1$"


def _parse_points(value: Any) -> Any:
    return [value] if isinstance(value, (int, str)) else value


def _parse_groups(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    named = {str(key).replace(" ", ""): count for key, count in value.items()} if isinstance(value, dict) else value
    try:
        return check(named)
    except ValidationError:  # it has a line for each form that groups may have
        raise ConfigError(
            "parallel.groups: expected auto, or how many ranks each length has, 1 or more, such as {14: 4, 10+7: 1}, "
            f"with a space after each colon, got {value!r}"
        ) from None


class Section(BaseModel):
    """A part of the config: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where a run lives, and on what it runs."""

    dir: Path = Path("runs/run")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint: Path | None = None  # for label, evaluate, predict; none = the newest of the run


class SplitConfig(Section):
    """Which videos make a split."""

    annotations: Path | None = None  # an official CSV, a `path label` list, a JSON list, or a folder per class


class DataConfig(Section):
    """The videos, how they are read, and how they are augmented."""

    root: Path | None = None  # where the relative paths of a list start; none = the folder of the list
    train: SplitConfig = SplitConfig()
    val: SplitConfig = SplitConfig()
    classes: Path | None = None  # class names in label order: a file (lines, CSV or JSON), or `kinetics400`
    holdout: Fraction = 0.0  # share of the train split kept out of stage 1, for `label.source: holdout`
    reader: Literal["auto", "decord", "pyav"] = "auto"
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"  # processes; auto = the CPUs that the job has
    timeout_s: Positive = 300.0
    short_side: tuple[int, int] | None = None  # training: range of the short side before the crop; none = model.size
    crop_area: tuple[Positive, Positive] | None = None  # training, instead: range of a crop's share of the frame
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of resizing before a crop
    flip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    rand_augment: Annotated[str, Field(pattern=_RAND_AUGMENT)] | None = None  # timm's, such as rand-m9-mstd0.5-inc1
    color_jitter: Annotated[float, Field(ge=0.0)] = 0.0  # of brightness, contrast and saturation
    erase: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # probability of random erasing
    mixup: Annotated[float, Field(ge=0.0)] = 0.0  # alpha of the beta distribution; 0 = off
    cutmix: Annotated[float, Field(ge=0.0)] = 0.0
    mix_token: Annotated[float, Field(ge=0.0)] = 0.0  # cutmix of tokens instead of pixels (LV-ViT)
    token_labels: Path | None = None  # LV-ViT's label maps, CLASS/NAME.pt for each training image

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0 or self.mix_token > 0


class IndexConfig(Section):
    """How files are looked at before they are used."""

    verify: Literal["quick", "full"] = "quick"  # full = every frame is decoded, and damage is noted
    timeout_s: Positive = 60.0  # for one file; one that takes longer is recorded as broken


class ModelConfig(Section):
    """The architecture and the input that it expects: enough to build the model and to feed it a file."""

    width: Count = 768
    depth: Count = 12
    heads: Count = 12
    mlp_ratio: Positive = 4.0
    patch: Count = 16
    size: Count = 224  # side of the square crop, in pixels
    num_frames: Count = 8
    stride_frames: Count = 32  # between two frames of a clip, counted at `fps`
    fps: Positive | None = 30.0  # none: strides count the file's own frames
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[Positive, Positive, Positive] = (0.225, 0.225, 0.225)
    num_classes: Count = 400
    points: Annotated[tuple[str, ...], BeforeValidator(_parse_points)] = ("14", "10", "7")
    temporal: bool = True  # divided space-time attention; off = frames are seen one by one
    drop_blocks: tuple[Count, ...] = (4, 7, 10)  # counted from 1; points with keep < 1 drop tokens there
    embed: Literal["resize", "kernel", "stem"] = "resize"
    align_corners: bool = False  # frames are resized as in SuperViT: corner on corner, and without antialiasing
    share_norm: bool = False
    share_patch: bool = False
    share_pos: bool = False
    distill_token: bool = False
    dense_head: Positive | None = None  # LV-ViT's second head, on patches: the weight of their best logits; none = none
    qkv_bias: bool = True
    layer_scale: float | None = None  # initial value; none = no LayerScale
    residual_scale: Positive = 1.0  # of what each branch adds; LV-ViT: 0.5
    norm_eps: Positive = 1e-6
    drop_path: Fraction = 0.0
    init_std: Positive = 0.02
    time_init_std: Annotated[float, Field(ge=0.0)] = 0.0  # TimeSformer starts its time embedding at zero

    @model_validator(mode="before")
    @classmethod
    def _canonical_points(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("points") is not None:
            given = _parse_points(values["points"])
            try:
                points = [Point.parse(p) for p in given] if isinstance(given, (list, tuple)) else []
            except ConfigError as error:
                raise ConfigError(f"model.points: {error}") from None
            if len(set(points)) < len(points) or not points:
                raise ConfigError(f"model.points: expected one or more different points, got {values['points']}")
            values = values | {"points": tuple(str(p) for p in sorted(points, reverse=True))}
        return values

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.width % self.heads:
            raise ConfigError(f"model.heads: {self.heads} does not divide model.width {self.width}")
        if not self.temporal and self.num_frames != 1:
            raise ConfigError(f"model.temporal: off needs model.num_frames 1, got {self.num_frames}")
        if self.embed == "stem" and self.patch % 2:
            raise ConfigError(
                f"model.embed: stem halves the frame first and needs an even model.patch, got {self.patch}"
            )
        for point in map(Point.parse, self.points):
            if point.length * self.patch > self.size:
                raise ConfigError(
                    f"model.points: length {point.length} with {self.patch}-pixel patches needs "
                    f"{point.length * self.patch} pixels, but model.size is {self.size}; "
                    f"take at most {self.size // self.patch}"
                )
            if point.keep < 1.0:
                self._check_drops(point)
        costliest_first = sorted(self.points, key=lambda point: -point_cost(self, point).total)
        self.__dict__["points"] = tuple(costliest_first)  # frozen for others; the costs need all other fields
        return self

    def _check_drops(self, point: Point) -> None:
        if not self.drop_blocks or max(self.drop_blocks) > self.depth:
            raise ConfigError(
                f"model.drop_blocks: expected some of the blocks 1 to {self.depth} (model.depth), where {point} drops "
                f"tokens, got {list(self.drop_blocks)}"
            )
        whole = Point(point.length)
        if point_cost(self, point).total >= point_cost(self, whole).total:
            raise ConfigError(
                f"model.points: {point} drops too few tokens to save anything; use {whole}, or a lower keep"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The different token lengths, longest first."""
        return tuple(sorted({Point.parse(p).length for p in self.points}, reverse=True))

    def kernel(self, length: int) -> int:
        """Side of the patches of a length, in pixels; its tokens are cut from frames of `length * kernel` pixels."""
        return self.size // length if self.embed == "kernel" else self.patch


class LossConfig(Section):
    """ReViT's objective (its section 3.3) between lengths, and SuperViT's between the keeps of a length."""

    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9  # weight of distillation in a student's loss
    tau: Positive = 1.0
    hard: bool = False  # students learn the teacher's top class instead of its distribution
    dropped: Literal["kl", "ce"] = "kl"  # below keep 1: learn from the same length at keep 1, or the truth alone
    label_smoothing: Fraction = 0.0
    dense_weight: Annotated[float, Field(ge=0.0)] = 0.5  # of the head on patches (model.dense_head), at every point
    map_share: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0  # of label maps, where given, in the target of the class


class TrainConfig(Section):
    """Stage 1: optimizer, schedule and checkpoints. The defaults are TimeSformer's."""

    init: str | None = None  # weights to start from: a file, a folder, or a timm name
    epochs: Count = 15
    draw: Literal["all", "sampled"] = "all"  # the points of a step: all of them (ReViT), or four drawn (SuperViT)
    batch: Count = 64  # clips a step, over all ranks
    accumulate: Count = 1  # a step's clips are run in this many parts
    optimizer: Literal["adamw", "sgd"] = "sgd"
    lr: Positive = 0.005
    momentum: Fraction = 0.9
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    schedule: Literal["cosine", "step"] = "step"
    milestones: tuple[Positive, ...] = (11, 14)  # epochs, for `step`
    gamma: Positive = 0.1
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    clip_grad: Positive | None = None
    ema: Fraction | None = None  # decay
    activation_checkpointing: bool = False
    compile: bool = False
    save_steps: Annotated[int, Field(ge=0)] = 0  # checkpoint every so many steps; 0 = every epoch
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.warmup_epochs > self.epochs:
            raise ConfigError(f"train.warmup_epochs: {self.warmup_epochs:g} is more than train.epochs {self.epochs}")
        if self.min_lr > self.lr:
            raise ConfigError(f"train.min_lr: {self.min_lr:g} is above train.lr {self.lr:g}")
        if self.batch % self.accumulate:
            raise ConfigError(
                f"train.batch: {self.batch} does not divide into train.accumulate {self.accumulate} equal parts"
            )
        return self


class PlanConfig(Section):
    """What `videoadapt plan` reckons with."""

    bandwidth_gbps: Positive = 100.0  # gigabits per second that a rank sends to the next one
    macs_per_s: Positive | None = None  # of a rank, in training; none = steps are measured on this machine
    clips: Count | None = None  # of an epoch; none = as many as the run's manifest has


class LabelConfig(Section):
    """Stage 2: on which clips, and by which rule, labels are made."""

    source: Literal["train", "holdout", "teacher"] = "train"
    none_right: Literal["longest", "cheapest", "exclude"] = "longest"


class AssignConfig(Section):
    """The assigner: a shrunken EfficientNet-B0 on a few small frames, and how it is fitted."""

    frames: Count = 4
    size: Count = 112
    channel_multiplier: Positive = 0.5
    stages: Annotated[int, Field(ge=1, le=7)] = 7
    epochs: Count = 30
    batch: Count = 64
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.02
    loss: Literal["ce", "expected_cost"] = "ce"
    mu: Annotated[float, Field(ge=0.0)] = 2.0  # price of a wrong answer, in units of the costliest point's cost
    select: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2  # share of the labelled clips that choose the threshold
    tolerance: Fraction = 0.005  # accuracy that the threshold may lose on those clips against the costliest point


class EvaluateConfig(Section):
    """The views of a video, and how speed is measured. Kinetics: 1 clip x 3 crops."""

    temporal_views: Count = 1
    spatial_crops: Count = 3
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # side of a crop over the short side of the frame
    batch: Count = 16  # views a forward pass
    failed: Literal["wrong", "exclude"] = "wrong"  # how a video that cannot be read counts
    speed_clips: Annotated[int, Field(ge=0)] = 64  # clips of the speed measurement; 0 = none
    speed_repeats: Count = 3
    # early exits, such as 8@0.5,14@0.7:0.6 or 8@0.5,14@0.7:cost=0.4 (docs/points.md)
    cascade: Annotated[tuple[str, ...], BeforeValidator(_parse_points)] = ()


class ParallelConfig(Section):
    """The ranks of a stage, which of them train what, and the shards of a stage that is an array of jobs."""

    # ranks of each length, such as {14: 4, 10: 2, 7: 1} or {14: 2, 10+7: 1}; auto = balanced by cost; none = every rank
    # trains every point
    groups: Annotated[Literal["auto"] | dict[str, Count] | None, WrapValidator(_parse_groups)] = None
    # with groups: shared = each clip is decoded once over all ranks, and sent to those that train it; own = each group
    # decodes every clip, and none is sent
    decode: Literal["own", "shared"] = "shared"
    ranks: Count | None = None  # how many there must be, or nothing starts; none = as many as the launcher started
    join_s: Positive = 50.0  # for all ranks to meet
    step_s: Positive = 1800.0  # that a rank waits for the others in a step of training, loading included
    shard: str | None = None  # I/N: score only this part of the videos (label, evaluate), and leave the rest to others

    @model_validator(mode="after")
    def _numbers(self) -> ParallelConfig:
        if self.shard is not None:
            number, _, count = self.shard.partition("/")
            if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
                raise ConfigError(f"parallel.shard: expected I/N with I from 0 to N - 1, such as 0/4, got {self.shard}")
        return self

    @property
    def shard_of(self) -> tuple[int, int]:
        """The number of this shard, from 0, and how many there are."""
        number, _, count = (self.shard or "0/1").partition("/")
        return int(number), int(count)


class LaunchConfig(Section):
    """What `videoadapt launch` starts, and where."""

    stage: Literal["train", "label", "assign", "evaluate", "all"] = "all"  # all = the four in turn
    cluster: Literal["slurm", "local"] = "slurm"  # local = on this machine, one stage after the other
    shards: Count = 1  # jobs of the array that label and evaluate are scored by; 1 = no array


class SlurmConfig(Section):
    """What a job asks SLURM for. `assign`, and each job of an array, is one task with its GPUs, CPUs and memory."""

    partition: str | None = None  # none, here and below: the cluster's default
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features that nodes must have
    exclude: str | None = None  # nodes that must not be used
    comment: str | None = None
    time_minutes: Count = 1440  # limit of one start of a job; near it, the job saves and is requeued
    nodes: Count = 1
    tasks_per_node: Count = 1  # one for each GPU
    gpus_per_task: Annotated[int, Field(ge=0, le=1)] = 1  # 0 on clusters without GPUs
    cpus_per_task: Count = 8  # one reads videos, or computes, for each
    mem_gb: Count | None = None  # of a node
    setup: tuple[str, ...] = ()  # shell lines before the command: modules, environments
    signal_s: Count = 120  # before the time limit, when the job is told to save
    max_restarts: Annotated[int, Field(ge=0)] = 20  # a job that needs more ends as failed

"""The sections of a config: each key with its type, default, allowed values and meaning."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from videoadapt.config.cost import point_cost
from videoadapt.config.parse import WrittenDict, WrittenList
from videoadapt.config.points import Point
from videoadapt.errors import ConfigError, shown

# Every number has a limit on both sides, far from what people use: beyond it, float32 overflows, a timer refuses its
# time, or a list of that many entries takes all memory.
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]  # below 1: at 1, momentum, EMA or dropout would keep nothing
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
Positive = Annotated[float, Field(ge=1e-12, le=1e6)]
Seconds = Annotated[float, Field(ge=1e-3, le=1e6)]  # Linux' poll() takes at most 2^31 ms
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
Average = Literal["probabilities", "logits"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # NumPy takes no negative seed, torch none of 64 bits
Resample = Literal["bicubic", "nearest", "nearest_flat"]
WhichWeights = Literal["ema", "last"]

IS_PATH = "path"  # marks a field of text that may be a path: `~` and `$NAME` in it are expanded

# timm's text form. `inc1` is required: its magnitudes all grow in strength, as in DeiT's and LV-ViT's recipes.
_RAND_AUGMENT = r"^rand(-(m\d{1,3}|n\d{1,2}|(p|mstd)\d{1,3}(\.\d{1,9})?)){0,9}-inc1$"
_CORE_INTEGER = re.compile(r"[-+]?0[xo][0-9a-fA-F]{1,16}")  # of YAML 1.2, beside the decimal ones
_SHARD = re.compile(r"(?P<number>[0-9]{1,6})/(?P<count>[0-9]{1,6})")
# As sbatch writes times: MIN, MIN:SEC, HOURS:MIN:SEC, DAYS-HOURS, DAYS-HOURS:MIN, DAYS-HOURS:MIN:SEC.
_SLURM_TIME = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<first>\d{1,7})(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?")


def is_path(annotation: Any) -> bool:
    """Returns whether a field of this type holds a path."""
    metadata = getattr(annotation, "__metadata__", ())
    return annotation is Path or IS_PATH in metadata or any(map(is_path, get_args(annotation)))


def _members(annotation: Any) -> list[Any]:
    """Returns the types of a union, or the type itself, without what `Annotated` adds to them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


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


def _as_list(value: Any) -> Any:
    """Wraps one point or one cascade in a list, so that it needs no brackets: `model.points=14`."""
    return [value] if isinstance(value, (int, str)) else value


def _check_groups_type(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    # YAML reads the key 14 as a number, and users write `10 + 7` with spaces.
    groups = {str(key).replace(" ", ""): count for key, count in value.items()} if isinstance(value, dict) else value
    try:
        return validate(groups)
    except ValidationError:  # pydantic has one error for each type of the union, which does not help a user
        raise ConfigError(
            "parallel.groups: expected auto, or how many ranks each length has, 1 or more, such as {14: 4, 10+7: 1}, "
            f"with a space after each colon, got {shown(value)}"
        ) from None


class Section(BaseModel):
    """A part of the config. It is immutable, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _type_decides(cls, value: Any, info: ValidationInfo) -> Any:
        """Gives what was written the meaning that the type of the field asks for.

        A field of text or of a path takes numbers and lists as they were written; a list of texts takes one text.
        """
        members = _members(cls.model_fields[info.field_name or ""].annotation)
        if str in members or Path in members:
            if isinstance(value, (WrittenList, WrittenDict)) and value.text:
                return value.text
            return str(value) if type(value) in (int, float) else value
        if isinstance(value, str):
            if any(get_origin(each) is tuple and str in _members(get_args(each)[0]) for each in members):
                return (value,)
            if int in members and _CORE_INTEGER.fullmatch(value):
                return int(value, 0)
        return value


class RunConfig(Section):
    """The run folder, the device and the seed."""

    dir: Path = Path("runs/run")
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint: Path | None = None  # checkpoint for label, evaluate and predict; null = the newest of the run


class SplitConfig(Section):
    """The videos of a split."""

    annotations: Path | None = None  # an official CSV, a `path label` list, a JSON list, or a folder per class


class DataConfig(Section):
    """The videos, and how they are read and augmented."""

    root: Path | None = None  # folder for relative paths in a list; null = the folder of the list
    train: SplitConfig = SplitConfig()
    val: SplitConfig = SplitConfig()
    classes: Path | None = None  # class names in label order: a file (lines, CSV or JSON), or `kinetics400`, 600, 700
    kind: Literal["auto", "videos", "images"] = (
        "auto"  # entries of lists and folders to use; auto = all are of one kind
    )
    holdout: Fraction = 0.0  # fraction of the train split kept out of stage 1, for `label.source: holdout`
    reader: Literal["auto", "decord", "pyav"] = "auto"
    # Larger videos and images are refused. 8K is 33 million pixels; 18 hours at 30 fps are 2 million frames.
    max_pixels: Annotated[int, Field(ge=1, le=10**9)] = 64_000_000  # of a frame
    max_frames: Annotated[int, Field(ge=1, le=10**9)] = 2_000_000  # of a video, or images of a folder
    # Processes; auto = the CPUs that the job has.
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)] = "auto"
    timeout_s: Seconds = 300.0  # longest time in which a worker reads one clip
    # Frames of a clip. dense: at model.stride_frames, as for Kinetics. segments: spread over the whole video, as for
    # Something-Something; model.stride_frames, model.fps and evaluate.single_clip are not used then.
    sampling: Literal["dense", "segments"] = "dense"
    # Training crops. short_side: resize the short side to a random size in [LOW, HIGH], then crop model.size; null =
    # model.size. crop_area: crop a random fraction of the frame's area in [LOW, HIGH], then resize; it needs
    # short_side null.
    short_side: tuple[Pixels, Pixels] | None = None
    crop_area: tuple[Positive, Positive] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # method of resizing before a crop
    antialias: bool = True  # smooth before making frames smaller, as Pillow does; TimeSformer's code does not
    flip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5  # probability of a horizontal flip
    rand_augment: Annotated[str, Field(pattern=_RAND_AUGMENT)] | None = None  # as in timm: rand-m9-mstd0.5-inc1
    color_jitter: Weight = 0.0  # strength for brightness, contrast and saturation
    erase: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # probability of random erasing
    mixup: Weight = 0.0  # alpha of the beta distribution; 0 = off
    cutmix: Weight = 0.0  # alpha of the beta distribution; 0 = off
    mix_token: Weight = 0.0  # alpha of cutmix with patch tokens instead of pixels (LV-ViT)
    token_labels: Path | None = None  # folder of LV-ViT's label maps, with CLASS/NAME.pt for each training image

    @property
    def mixes(self) -> bool:
        """Whether two clips are mixed into one."""
        return self.mixup > 0 or self.cutmix > 0 or self.mix_token > 0


class IndexConfig(Section):
    """How `index` probes the video files."""

    verify: Literal["quick", "full"] = "quick"  # full = decode every frame and record errors
    timeout_s: Seconds = 60.0  # limit for one file; a slower file is recorded as broken


class ModelConfig(Section):
    """The architecture and its input: all settings to build the model and to sample its frames from a file."""

    width: Annotated[int, Field(ge=1, le=65_536)] = 768
    depth: Annotated[int, Field(ge=1, le=1000)] = 12
    heads: Count = 12
    mlp_ratio: Positive = 4.0
    patch: Pixels = 16  # side of a patch in pixels
    size: Pixels = 224  # side of the square crop in pixels
    num_frames: Annotated[int, Field(ge=1, le=10_000)] = 8
    stride_frames: Count = 32  # distance of two frames of a clip, counted at `fps`
    fps: Annotated[float, Field(ge=1e-3, le=1e6)] | None = 30.0  # null = the stride counts the frames of the file
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)  # mean of RGB values in [0, 1], for normalisation
    std: tuple[Positive, Positive, Positive] = (0.225, 0.225, 0.225)
    num_classes: Count = 400
    points: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ("14", "10", "7")
    temporal: bool = True  # divided space-time attention; false = no attention between frames
    drop_blocks: tuple[Count, ...] = (4, 7, 10)  # numbers from 1; points with keep < 1 drop tokens in these blocks
    embed: Literal["resize", "kernel", "stem"] = "resize"  # method that makes tokens of each length (docs/points.md)
    align_corners: bool = False  # resize frames as SuperViT does: aligned corners, no antialiasing
    # One set of weights for all lengths instead of one for each: LayerNorm, patch embedding, position embedding.
    share_norm: bool = False
    share_patch: bool = False
    share_pos: bool = False
    distill_token: bool = False  # a second class token for student points (ReViT, figure 3)
    dense_head: Positive | None = None  # weight of the logits of LV-ViT's head on patches; null = no head on patches
    qkv_bias: bool = True
    layer_scale: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None  # initial value; null = no LayerScale
    residual_scale: Positive = 1.0  # factor of attention and MLP outputs before they are added; LV-ViT: 0.5
    norm_eps: Positive = 1e-6
    drop_path: Fraction = 0.0  # probability in the last block, rising linearly from 0 in the first
    # One draw of drop path in attention is for a whole clip, or for each sequence of the call (TimeSformer's code): a
    # position in temporal attention, a frame in spatial attention.
    drop_path_unit: Literal["clip", "sequence"] = "clip"
    init_std: Positive = 0.02  # standard deviation of new linear layers and embeddings
    time_init_std: Weight = 0.0  # TimeSformer starts its time embedding at zero

    @model_validator(mode="before")
    @classmethod
    def _canonical_points(cls, values: Any) -> Any:
        # Before the fields are checked: a wrong point is reported by its own message, not as a wrong type.
        if isinstance(values, dict) and values.get("points") is not None:
            given = _as_list(values["points"])
            try:
                points = [Point.parse(p) for p in given] if isinstance(given, (list, tuple)) else []
            except ConfigError as error:
                raise ConfigError(f"model.points: {error}") from None
            if len(set(points)) < len(points) or not points:
                raise ConfigError(f"model.points: expected one or more different points, got {values['points']}")
            values = values | {"points": tuple(str(p) for p in sorted(points, reverse=True))}
        return values

    @model_validator(mode="after")
    def _check_architecture(self) -> ModelConfig:
        if self.width % self.heads:
            raise ConfigError(f"model.heads: {self.heads} does not divide model.width {self.width}")
        if not self.temporal and self.num_frames != 1:
            raise ConfigError(f"model.temporal: false needs model.num_frames 1, got {self.num_frames}")
        if self.embed == "stem" and self.patch % 2:
            raise ConfigError(
                f"model.embed: stem halves the resolution first and needs an even model.patch, got {self.patch}"
            )
        for point in map(Point.parse, self.points):
            if point.length * self.patch > self.size:
                raise ConfigError(
                    f"model.points: length {point.length} with {self.patch}-pixel patches needs "
                    f"{point.length * self.patch} pixels, but model.size is {self.size}; the largest length is "
                    f"{self.size // self.patch}"
                )
            if point.keep < 1.0:
                self._check_drops(point)
        costliest_first = sorted(self.points, key=lambda point: -point_cost(self, point).total)
        # Sorted here, because the cost depends on all other fields. The object is frozen, so a field can only be set
        # as in `__post_init__` of a frozen dataclass.
        object.__setattr__(self, "points", tuple(costliest_first))
        return self

    def _check_drops(self, point: Point) -> None:
        if not self.drop_blocks or max(self.drop_blocks) > self.depth:
            raise ConfigError(
                f"model.drop_blocks: {point} needs blocks that drop tokens, with numbers from 1 to {self.depth} "
                f"(model.depth), got {list(self.drop_blocks)}"
            )
        whole = Point(point.length)
        if point_cost(self, point).total >= point_cost(self, whole).total:
            raise ConfigError(
                f"model.points: {point} drops so few tokens that it saves nothing; use {whole}, or a lower keep"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The different token lengths, longest first."""
        return tuple(sorted({Point.parse(p).length for p in self.points}, reverse=True))

    def kernel(self, length: int) -> int:
        """Returns the side of a patch in pixels; a frame of this length has `length * kernel` pixels per side."""
        return self.size // length if self.embed == "kernel" else self.patch


class LossConfig(Section):
    """The loss: ReViT's distillation between lengths (section 3.3), and SuperViT's between keeps of one length."""

    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9  # weight of the distillation term in a student's loss
    tau: Positive = 1.0  # temperature of the softmax in the distillation term
    hard: bool = False  # the target is the teacher's top class instead of its distribution
    dropped: Literal["kl", "ce"] = "kl"  # points with keep < 1 learn from their length at keep 1, or from the labels
    label_smoothing: Fraction = 0.0
    dense_weight: Weight = 0.5  # weight of the loss of the head on patches (model.dense_head)
    # Lengths whose patches have this loss, at keep 1: all, or the longest alone (SuperViT's code).
    dense_lengths: Literal["all", "longest"] = "all"
    map_share: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0  # weight of the label map in the target of the class token


class TrainConfig(Section):
    """Stage 1: optimizer, schedule and checkpoints. The defaults are TimeSformer's recipe."""

    init: Annotated[str, IS_PATH] | None = None  # initial weights: a file, a folder, or the name of a timm model
    weights: WhichWeights = "ema"  # weights of a file that has both: their moving average, or the last ones
    resample: Resample = "bicubic"  # how initial weights of another length or number of frames are resampled
    epochs: Count = 15
    draw: Literal["all", "sampled"] = "all"  # points of a step: all (ReViT), or four random ones (SuperViT)
    batch: Count = 64  # clips of a step, over all ranks
    accumulate: Count = 1  # micro-batches of a step
    optimizer: Literal["adamw", "sgd"] = "sgd"
    lr: Positive = 0.005
    momentum: Fraction = 0.9
    nesterov: bool = False  # Nesterov's momentum; only for sgd, with momentum above 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Weight = 1e-4
    # Parameters that decay: matrices and kernels alone, or all but the BatchNorms of stems (TimeSformer's code).
    decay: Literal["matrices", "all"] = "matrices"
    schedule: Literal["cosine", "step"] = "step"
    milestones: tuple[Positive, ...] = (11, 14)  # epochs, for `step`
    gamma: Positive = 0.1  # factor of the learning rate at each milestone
    warmup_epochs: Weight = 0.0
    min_lr: Weight = 0.0
    clip_grad: Positive | None = None  # maximum norm of the gradient; null = no clipping
    ema: Fraction | None = None  # decay of the moving average of the weights; null = no average
    activation_checkpointing: bool = False
    compile: bool = False
    save_steps: Annotated[int, Field(ge=0, le=10**12)] = 0  # steps between two checkpoints; 0 = one each epoch
    # At least 2: if the newest file is damaged, the one before it is used.
    keep_checkpoints: Annotated[int, Field(ge=2, le=10**6)] = 2

    @model_validator(mode="after")
    def _check_schedule_and_batch(self) -> TrainConfig:
        if self.warmup_epochs > self.epochs:
            raise ConfigError(f"train.warmup_epochs: {self.warmup_epochs:g} is more than train.epochs {self.epochs}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0.0):
            raise ConfigError(
                f"train.nesterov: needs train.optimizer=sgd and train.momentum above 0, got {self.optimizer} and "
                f"{self.momentum:g}; set train.nesterov=false"
            )
        if self.min_lr > self.lr:
            raise ConfigError(f"train.min_lr: {self.min_lr:g} is above train.lr {self.lr:g}")
        if self.batch % self.accumulate:
            raise ConfigError(
                f"train.batch: {self.batch} clips cannot be split into {self.accumulate} equal micro-batches "
                "(train.accumulate)"
            )
        return self


class PlanConfig(Section):
    """Assumptions of `videoadapt plan`."""

    bandwidth_gbps: Positive = 100.0  # gigabits per second from one rank to the next
    macs_per_s: Annotated[float, Field(ge=1.0, le=1e21)] | None = None  # speed of a rank in training; null = measured
    clips: Annotated[int, Field(ge=1, le=10**12)] | None = None  # clips in an epoch; null = those of the manifest


class LabelConfig(Section):
    """Stage 2: the clips and the rule for the labels."""

    # teacher: a point is right if it agrees with the costliest point.
    source: Literal["train", "holdout", "teacher"] = "train"
    none_right: Literal["longest", "cheapest", "exclude"] = "longest"  # label of a clip on which no point is right


class AssignConfig(Section):
    """The assigner, a small EfficientNet-B0 on a few low-resolution frames, and its training."""

    frames: Annotated[int, Field(ge=1, le=10_000)] = 4  # frames of a clip
    size: Pixels = 112  # side of a frame in pixels
    channel_multiplier: Annotated[float, Field(ge=0.01, le=100.0)] = 0.5  # 1 = the width of EfficientNet-B0
    stages: Annotated[int, Field(ge=1, le=7)] = 7  # number of stages of EfficientNet-B0 that are used, from the first
    epochs: Count = 30
    batch: Count = 64
    lr: Positive = 1e-3
    weight_decay: Weight = 0.02
    loss: Literal["ce", "expected_cost"] = "ce"
    mu: Weight = 2.0  # cost of a wrong prediction, in units of the costliest point's cost
    # Fraction of the labelled clips on which the threshold is chosen.
    select: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    tolerance: Fraction = 0.005  # accuracy that may be lost on them, compared with the costliest point


class EvaluateConfig(Section):
    """The views of a video, the policies, and the measurement of speed. Kinetics: 1 clip x 3 crops.

    `label` and `predict` use the same views and the same mean.
    """

    temporal_views: Count = 1  # clips of a video
    single_clip: Literal["centre", "start"] = "centre"  # place of the clip if temporal_views is 1; start = frame 0
    spatial_crops: Count = 3  # crops of a clip
    crop_offset: Literal["round", "ceil"] = "round"  # a crop between two pixels: the even one, or the next one
    average: Average = "probabilities"  # mean over the views of a video; logits = softmax of their mean
    crop_pct: Annotated[float, Field(ge=0.01, le=1.0)] = 1.0  # side of the crop / short side of the resized frame
    batch: Count = 16  # views of a forward pass
    failed: Literal["wrong", "exclude"] = "wrong"  # a video that cannot be read counts as wrong, or not at all
    speed_clips: Annotated[int, Field(ge=0, le=1_000_000)] = 64  # clips for measuring the speed; 0 = not measured
    speed_repeats: Count = 3
    # For example 8@0.5,14@0.7:0.6 or 8@0.5,14@0.7:cost=0.4 (docs/points.md).
    cascade: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()


class ParallelConfig(Section):
    """The ranks of a stage, the groups of ranks that train a length, and the shards of an array of jobs."""

    # Number of ranks of each length, such as {14: 4, 10: 2, 7: 1} or {14: 2, 10+7: 1}; auto = balanced by cost; null =
    # every rank trains every point.
    groups: Annotated[Literal["auto"] | dict[str, Count] | None, WrapValidator(_check_groups_type)] = None
    # With groups: shared = each clip is decoded by one rank, which sends it to the ranks that train it; own = each
    # group decodes every clip.
    decode: Literal["own", "shared"] = "shared"
    ranks: Count | None = None  # required number; null = as many as the launcher has started
    join_s: Seconds = 50.0  # time in which all ranks must have started
    step_s: Seconds = 1800.0  # time that a rank waits for the others in a training step, loading included
    shard: str | None = None  # I/N: label and evaluate score only shard I of N of the videos

    @model_validator(mode="after")
    def _check_shard(self) -> ParallelConfig:
        if self.shard is not None:
            match = _SHARD.fullmatch(self.shard)
            if not match or int(match["number"]) >= int(match["count"]):
                raise ConfigError(
                    f"parallel.shard: expected I/N with I from 0 to N - 1, such as 0/4, got {shown(self.shard)}"
                )
        return self

    @property
    def shard_of(self) -> tuple[int, int]:
        """The number of this shard, from 0, and the number of shards."""
        number, _, count = (self.shard or "0/1").partition("/")
        return int(number), int(count)


class LaunchConfig(Section):
    """The stages that `videoadapt launch` starts, and where."""

    stage: Literal["train", "label", "assign", "evaluate", "all"] = "all"  # all = these four, in this order
    cluster: Literal["slurm", "local"] = "slurm"  # local = on this machine, one stage after the other
    shards: Annotated[int, Field(ge=1, le=100_000)] = 1  # jobs in the array of label and of evaluate; 1 = no array


class SlurmConfig(Section):
    """Resources of a SLURM job. `assign`, and each job of an array, has one task with its GPUs, CPUs and memory."""

    partition: str | None = None  # null, here and below = the cluster's default
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # required features of the nodes
    exclude: Annotated[str, BeforeValidator(_host_list)] | None = None  # names of nodes to avoid
    comment: str | None = None
    # Limit of one start; shortly before it, the job saves and is requeued. A number, or a time as sbatch writes it.
    time_minutes: Annotated[Count, BeforeValidator(_slurm_minutes)] = 1440
    nodes: Count = 1
    tasks_per_node: Count = 1  # one for each GPU
    gpus_per_task: Annotated[int, Field(ge=0, le=1)] = 1  # 0 = no GPUs; a rank uses one at most
    cpus_per_task: Count = 8  # the data workers of a task share them
    mem_gb: Count | None = None  # memory of each node, in GB
    setup: tuple[str, ...] = ()  # shell lines before the command, to load modules or an environment
    signal_s: Count = 120  # seconds before the time limit at which the job gets the signal to save
    max_restarts: Annotated[int, Field(ge=0, le=1_000_000)] = 20  # a job that needs more fails

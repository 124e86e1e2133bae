"""The sections of a config: each key with its type, default, allowed values and meaning."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
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
from pydantic_core import PydanticCustomError

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
Format = Literal["onnx", "torch", "pretrained"]
Resample = Literal["bicubic", "nearest", "nearest_flat"]
WhichWeights = Literal["ema", "last"]
ValidateOn = Literal["val", "holdout"] | Annotated[float, Field(gt=0.0, lt=1.0)]

TOP5 = 5  # top-5 needs more classes than these: of five, the true one is always among five

IS_PATH = "path"  # marks a field of text that may be a path: `~` and `$NAME` in it are expanded

# timm's text form. `inc1` is required: its magnitudes all grow in strength, as in DeiT's and LV-ViT's recipes.
_RAND_AUGMENT = r"^rand(-(m\d{1,3}|n\d{1,2}|(p|mstd)\d{1,3}(\.\d{1,9})?)){0,9}-inc1$"
_CORE_INTEGER = re.compile(r"[-+]?0[xo][0-9a-fA-F]{1,16}")  # of YAML 1.2, beside the decimal ones
_SHARD = re.compile(r"(?P<number>[0-9]{1,6})/(?P<count>[0-9]{1,6})")
_SLURM_PATTERN = re.compile(r"%\d*[AaJjNnstux]")  # in names of log files; sbatch replaces it


def is_path(annotation: Any) -> bool:
    """Returns whether a field of this type holds a path."""
    metadata = getattr(annotation, "__metadata__", ())
    return annotation is Path or IS_PATH in metadata or any(map(is_path, get_args(annotation)))


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Returns whether a field of this type is a section."""
    # `get_origin`: for Python 3.10, list[int] is an instance of `type`, but no class.
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, Section)


def _members(annotation: Any) -> list[Any]:
    """Returns the types of a union, or the type itself, without what `Annotated` adds to them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


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

    # The docstring under each field is its description in `videoadapt config`, docs/config.md and the JSON schema.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _type_decides(cls, value: Any, info: ValidationInfo) -> Any:
        """Gives what was written the meaning that the type of the field asks for.

        A field of text or of a path takes numbers and lists as they were written; a list of texts takes one text; a
        section without keys has its defaults.
        """
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value is None and is_section(annotation):
            return {}  # a section whose keys are all comments
        members = _members(annotation)
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


def _check_folder(path: Path) -> Path:
    if match := _SLURM_PATTERN.search(str(path)):
        raise PydanticCustomError(
            "folder", f"expected one folder for all stages and jobs of a run, without SLURM's {match[0]}"
        )
    return path


def _on_or_off(value: object) -> object:
    """Returns the word for a truth value: YAML reads `on` as one, and earlier versions had one."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return (
        {"true": "on", "yes": "on", "false": "off", "no": "off"}.get(value.lower(), value)
        if isinstance(value, str)
        else value
    )


class RunConfig(Section):
    """The run folder, the device and the seed."""

    dir: Annotated[Path, AfterValidator(_check_folder)] = Path("runs/run")
    """Folder of the run: checkpoints, labels, tables and logs. All stages of a run share it."""
    seed: Seed = 0
    """Seed of the initial weights, the order of clips, augmentation and drawn points. Two runs with the same seed on
    the same CPU are equal to the bit; for GPUs see `run.deterministic`."""
    deterministic: bool = False
    """Use the operations of a GPU that give the same bits each time, which are slower. A warning names an operation
    that has no such form. On CPUs it changes nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of model and assigner. `auto` is the GPU where there is one, otherwise the CPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of activations. In training with `bf16` (autocast), weights and their updates stay in float32. `bf16` suits
    GPUs from Ampere on."""
    checkpoint: Path | None = None
    """Checkpoint that the verbs after `train` use: `last`; `best` by the validations while training; a file; or a run
    folder, whose newest is used. null = `last`."""


class SplitConfig(Section):
    """The videos of a split."""

    annotations: Path | None = None
    """The videos with their classes: an official CSV, a `path label` list, a JSON list, or a folder with a folder per
    class. null = the split does not exist."""


# pydantic warns of a field that is named as a method of its base class; `BaseModel.validate` is deprecated and unused.
warnings.filterwarnings("ignore", 'Field name "validate" in "DataConfig" shadows', UserWarning)


class DataConfig(Section):
    """The videos, and how they are read and augmented."""

    root: Path | None = None
    """Folder for relative paths in a list. null = the folder of the list."""
    train: SplitConfig = SplitConfig()
    """Videos of training, and of `label` and `assign`."""
    val: SplitConfig = SplitConfig()
    """Videos of `evaluate`."""
    classes: Path | None = None
    """Class names in label order: a file (lines, CSV or JSON), or `kinetics400`, `kinetics600`, `kinetics700`. null =
    names from the annotations, where these have them."""
    kind: Literal["auto", "videos", "images"] = "auto"
    """Entries of lists and folders to use: videos or images. An image is a clip of one frame. `auto` = all entries are
    of one kind, which is found out."""
    holdout: Fraction = 0.0
    """Fraction of the train split that stage 1 does not train on, for `label.source: holdout` and
    `data.validate: holdout`. 0 = none."""
    calibrate: Fraction = 0.0
    """Fraction of the train split that `calibrate` alone uses: nothing is fitted to these videos. They are other videos
    than those of `data.holdout`. 0 = none."""
    source_pattern: str | None = None
    """Regular expression for ids of videos, in lists their paths, whose one group is the source: the scene, person or
    camera. Videos of one source stay together in `data.holdout` and `data.calibrate`, and are one unit in intervals of
    `evaluate`. `(.*)\\d\\.jpg` makes blocks of ten of numbered photos. null = the YouTube video of a Kinetics clip."""
    validate: ValidateOn = "val"  # type: ignore[assignment] # BaseModel has a method of this name
    """Videos of the validation while training (`train.validate_every`): the val split, the clips of `data.holdout`, or
    a fraction of the val split, such as 0.2, with the same videos in every run."""
    reader: Literal["auto", "decord", "pyav"] = "auto"
    """Video reader. `auto` = decord for files in which its frames are known to be exact, if it is installed, and PyAV
    for all others."""
    max_pixels: Annotated[int, Field(ge=1, le=10**9)] = 64_000_000
    """Most pixels of a frame. A video or an image with larger frames is refused. 8K has 33 million."""
    max_frames: Annotated[int, Field(ge=1, le=10**9)] = 2_000_000
    """Most frames of a video, or images of a folder. A longer one is refused. 18 hours at 30 frames a second are 2
    million."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)] = "auto"
    """Processes of each rank that read clips. 0 = the main process reads them. `auto` = one for each CPU that the rank
    may use; with a GPU, one less, since launching its work takes a core."""
    timeout_s: Seconds = 300.0
    """Seconds in which a worker must have read one clip. After that the run stops, and names the file."""
    sampling: Literal["dense", "segments"] = "dense"
    """Frames of a clip. `dense`: at `model.stride_frames`, as for Kinetics. `segments`: spread over the whole video, as
    for Something-Something; `model.stride_frames`, `model.fps` and `evaluate.single_clip` are not used then."""
    short_side: tuple[Pixels, Pixels] | None = None
    """Training crops: [LOW, HIGH] in pixels. The short side is resized to a random size between them, then a square of
    `model.size` is cut. TimeSformer: [256, 320]. null = `model.size`."""
    crop_area: tuple[Positive, Positive] | None = None
    """Training crops: [LOW, HIGH], fractions of the frame's area. A random part of such an area is cut and resized to
    `model.size`. DeiT: [0.08, 1]. It needs `data.short_side` null. null = off."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Method of resizing before a crop, in training and evaluation. TimeSformer: bilinear. DeiT: bicubic."""
    antialias: bool = True
    """Smooth before frames are made smaller, as Pillow does. TimeSformer's code does not."""
    flip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Probability that a training clip is mirrored. Use 0 where left and right matter (Something-Something)."""
    rand_augment: Annotated[str, Field(pattern=_RAND_AUGMENT)] | None = None
    """RandAugment of training clips in timm's text form, such as `rand-m9-mstd0.5-inc1` (DeiT). null = off."""
    color_jitter: Weight = 0.0
    """Strength of random brightness, contrast and saturation of training clips: 0.4 changes each by up to 40 %. 0 =
    off."""
    erase: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Probability of random erasing, which fills a box of a training clip with noise. DeiT: 0.25. 0 = off."""
    mixup: Weight = 0.0
    """Alpha of the beta distribution that mixes pairs of training clips and their labels. DeiT: 0.8. 0 = off."""
    cutmix: Weight = 0.0
    """Alpha of the beta distribution for boxes of one training clip pasted into another. DeiT: 1.0. 0 = off. With
    `data.mixup` also on, each pair draws one of the two."""
    mix_token: Weight = 0.0
    """Alpha of CutMix with patch tokens instead of pixels. LV-ViT: 1.0. 0 = off."""
    token_labels: Path | None = None
    """Folder of LV-ViT's label maps, with CLASS/NAME.pt for each training image. It needs `model.dense_head` and
    `model.num_frames: 1`. null = off."""

    @model_validator(mode="after")
    def _check_source_pattern(self) -> DataConfig:
        if self.source_pattern is not None:
            try:
                groups = re.compile(self.source_pattern).groups
            except re.error as error:
                raise ConfigError(f"data.source_pattern: not a regular expression: {error}") from None
            if groups != 1:
                raise ConfigError(f"data.source_pattern: expected one group, (...), the source; it has {groups}")
        return self

    @property
    def mixes(self) -> bool:
        """Whether two clips are mixed into one."""
        return self.mixup > 0 or self.cutmix > 0 or self.mix_token > 0


class IndexConfig(Section):
    """How `index` probes the video files."""

    verify: Literal["quick", "full"] = "quick"
    """Check of each file. `quick` reads its properties and decodes one frame. `full` decodes every frame and records
    errors."""
    timeout_s: Seconds = 60.0
    """Seconds for one file. A slower file is recorded as broken."""


class ModelConfig(Section):
    """The architecture and its input: all settings to build the model and to sample its frames from a file."""

    width: Annotated[int, Field(ge=1, le=65_536)] = 768
    """Width of a token (embedding dimension). ViT-B: 768, ViT-S: 384, ViT-Ti: 192."""
    depth: Annotated[int, Field(ge=1, le=1000)] = 12
    """Number of transformer blocks."""
    heads: Count = 12
    """Attention heads of a block. `model.width` must be divisible by it."""
    mlp_ratio: Positive = 4.0
    """Width of the hidden layer of an MLP, divided by `model.width`."""
    patch: Pixels = 16
    """Side of a patch in pixels."""
    size: Pixels = 224
    """Side of the square crop in pixels. The largest length is `model.size` divided by `model.patch`."""
    num_frames: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Frames of a clip. TimeSformer: 8; its HR variant 16, L 96. 1 = images."""
    stride_frames: Count = 32
    """A clip covers `model.num_frames` times this many frames, counted at `model.fps`, and its own frames are spread
    evenly over them, both ends included. TimeSformer on Kinetics: 32."""
    fps: Annotated[float, Field(ge=1e-3, le=1e6)] | None = 30.0
    """Frames a second at which `model.stride_frames` is counted, so that clips of all videos last equally long. null =
    the stride counts the frames of the file."""
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    """Mean of RGB values in [0, 1], for normalisation; it belongs to the weights. TimeSformer: 0.45 three times.
    ImageNet: [0.485, 0.456, 0.406]."""
    std: tuple[Positive, Positive, Positive] = (0.225, 0.225, 0.225)
    """Standard deviation of RGB values in [0, 1], for normalisation; it belongs to the weights. TimeSformer: 0.225
    three times. ImageNet: [0.229, 0.224, 0.225]."""
    num_classes: Count = 400
    """Number of classes. Kinetics-400: 400, ImageNet: 1000."""
    points: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ("14", "10", "7")
    """Operating points, LENGTH or LENGTH@KEEP: tokens per side of a frame, and the fraction of them that stays
    (docs/points.md). They are sorted by cost, costliest first."""
    temporal: bool = True
    """Divided space-time attention (TimeSformer). false = no attention between frames, for `model.num_frames: 1`."""
    drop_blocks: tuple[Count, ...] = (4, 7, 10)
    """Numbers, from 1, of the blocks in which points with keep < 1 drop tokens. SuperViT: [4, 7, 10]."""
    embed: Literal["resize", "kernel", "stem"] = "resize"
    """How tokens of each length are made. `resize`: frames are resized, and the patch stays. `kernel`: frames keep
    their size, and the patch grows. `stem`: as `resize`, with convolutions before the patches (LV-ViT, ReViT)."""
    align_corners: bool = False
    """Resize frames between lengths as SuperViT does: aligned corners, no antialiasing."""
    share_norm: bool = False
    """One set of LayerNorms for all lengths instead of one for each (ReViT, section 3.2)."""
    share_patch: bool = False
    """One patch embedding for all lengths instead of one for each."""
    share_pos: bool = False
    """One position embedding for all lengths: the upper left part of the longest one, instead of one for each."""
    distill_token: bool = False
    """A second class token for student points, which learns from the teacher (ReViT, figure 3)."""
    dense_head: Positive | None = None
    """Weight of the logits of a head on patches at inference. LV-ViT: 0.5. null = no head on patches."""
    qkv_bias: bool = True
    """Query, key and value of attention have a bias, as in ViT."""
    layer_scale: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    """Initial value of LayerScale, a learnt factor of each channel after attention and MLP. null = no LayerScale."""
    residual_scale: Positive = 1.0
    """Factor of attention and MLP outputs before they are added. LV-ViT: 0.5."""
    norm_eps: Positive = 1e-6
    """Epsilon in the LayerNorms. ViT and TimeSformer: 1e-6."""
    drop_path: Fraction = 0.0
    """Probability of drop path (stochastic depth) in the last block, rising linearly from 0 in the first. TimeSformer
    and DeiT: 0.1. 0 = off."""
    drop_path_unit: Literal["clip", "sequence"] = "clip"
    """One draw of drop path in attention is for a whole clip, or for each sequence of the call (TimeSformer's code): a
    position in temporal attention, a frame in spatial attention."""
    init_std: Positive = 0.02
    """Standard deviation of new linear layers and embeddings."""
    time_init_std: Weight = 0.0
    """Standard deviation of a new time embedding. TimeSformer starts it at 0."""

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
            # As text, which is what the model knows of a point: 14@0.7 and 14@0.7000001 are the same.
            if len(set(map(str, points))) < len(points) or not points:
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

    @property
    def shares_stem(self) -> bool:
        """Whether several lengths share one stem, and the statistics of its BatchNorms."""
        return self.embed == "stem" and self.share_patch and len(self.lengths) > 1

    def kernel(self, length: int) -> int:
        """Returns the side of a patch in pixels; a frame of this length has `length * kernel` pixels per side."""
        return self.size // length if self.embed == "kernel" else self.patch


class LossConfig(Section):
    """The loss: ReViT's distillation between lengths (section 3.3), and SuperViT's between keeps of one length."""

    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """Weight of the distillation term in a student's loss; the true label has the rest. 0 = no distillation, 1 = no
    true label."""
    tau: Positive = 1.0
    """Temperature of the softmax in the distillation term."""
    hard: bool = False
    """The target is the teacher's top class instead of its distribution. `loss.tau` must stay 1 then."""
    dropped: Literal["kl", "ce"] = "kl"
    """Points with keep < 1 learn from their length at keep 1 (`kl`), or from the labels (`ce`)."""
    label_smoothing: Fraction = 0.0
    """Part of the target that is spread over all classes. DeiT: 0.1. 0 = off."""
    dense_weight: Weight = 0.5
    """Weight of the loss of the head on patches (`model.dense_head`). LV-ViT: 0.5."""
    dense_lengths: Literal["all", "longest"] = "all"
    """Lengths whose patches have this loss, at keep 1: all, or the longest alone (SuperViT's code)."""
    map_share: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Weight of the label map (`data.token_labels`) in the target of the class token; the true label has the rest."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of a clip in the cross-entropy with the labels. `balanced` = clips / (classes * clips of its class), for
    classes of very different sizes; the mean weight of the training clips is 1. Distillation has no weights."""


class TrainConfig(Section):
    """Stage 1: optimizer, schedule and checkpoints. The defaults are TimeSformer's recipe."""

    init: Annotated[str, IS_PATH] | None = None
    """Initial weights: a file, a folder of Hugging Face, or the name of a timm model, such as `vit_base_patch16_224`.
    Of a run of one's own: `RUN/checkpoints/step-00012345.safetensors`. null = random weights."""
    weights: WhichWeights = "ema"
    """Weights to take from an initial file that has both: their moving average (`ema`), or the last ones."""
    resample: Resample = "bicubic"
    """How initial weights of another length or number of frames are resampled. `nearest_flat` = as TimeSformer's code
    when training starts."""
    freeze: Literal["backbone"] | Annotated[int, Field(ge=0, le=1000)] | None = None
    """Weights of `train.init` that are not trained. A number N = the embeddings and the first N blocks, `backbone` =
    all but the heads, null = none. Frozen parts have no decay and no drop path; they save time and memory."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of the learning rate from one block to the block before it, as in BEiT and timm: the head has `train.lr`,
    the embeddings the lowest rate. Usual for fine-tuning: 0.65 to 0.9. 1 = the same rate everywhere."""
    epochs: Count = 15
    """Passes over the train split."""
    draw: Literal["all", "sampled"] = "all"
    """Points of a step: all (ReViT), or four random ones (SuperViT)."""
    batch: Count = 64
    """Clips of a step, over all ranks. The learning rate is not scaled with it."""
    accumulate: Count = 1
    """Micro-batches into which each rank's clips of a step are split, one after the other, to save memory. It divides
    `train.batch`."""
    optimizer: Literal["adamw", "sgd"] = "sgd"
    """Optimizer. TimeSformer: sgd. DeiT: adamw."""
    lr: Positive = 0.005
    """Highest learning rate, for `train.batch` clips. It is not scaled with the batch."""
    momentum: Fraction = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov's momentum; only for sgd, with `train.momentum` above 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the two moving averages of adamw."""
    weight_decay: Weight = 1e-4
    """Weight decay; for adamw decoupled from the gradient. DeiT: 0.05."""
    decay: Literal["matrices", "all"] = "matrices"
    """Parameters that decay: matrices and kernels alone, or all but the BatchNorms of stems (TimeSformer's code)."""
    schedule: Literal["cosine", "step"] = "step"
    """Learning rate after the warm-up: a cosine down to `train.min_lr`, or steps at `train.milestones`."""
    milestones: tuple[Positive, ...] = (11, 14)
    """Epochs, fractions allowed, at which `train.schedule: step` multiplies the learning rate by `train.gamma`."""
    gamma: Positive = 0.1
    """Factor of the learning rate at each milestone."""
    warmup_epochs: Weight = 0.0
    """Epochs, fractions allowed, in which the learning rate rises linearly to `train.lr`. 0 = no warm-up."""
    min_lr: Weight = 0.0
    """Learning rate at the end of the cosine."""
    clip_grad: Positive | None = None
    """Largest norm of the gradient over all parameters; a longer one is shortened to it. null = no clipping."""
    ema: Fraction | None = None
    """Decay per step of the moving average of the weights, such as 0.9999. Later stages use the average. null = no
    average."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time, the
    same results."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = "auto"
    """Compile the model with `torch.compile`; the first steps take minutes. `auto` compiles where a measurement shows
    that compiled steps are right and faster: so far nowhere. If the compiler fails, training goes on without it."""
    save_steps: Annotated[int, Field(ge=0, le=10**12)] = 0
    """Steps between two checkpoints. 0 = one each epoch."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=10**6)] = 2
    """Checkpoints that stay on disk, newest first, and the best one beside them. At least 2: if the newest file is
    damaged, the one before it is used."""
    validate_every: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    """Epochs between two validations, on the videos of `data.validate`. The last epoch always has one. 0 = never."""
    best_metric: str | None = None
    """What the best checkpoint is best in: `top1`, `top5` or `loss`, at a point (`top1/14`) or as the mean over all
    points (`top1`). null = top-1 at the costliest point."""
    patience: Count | None = None
    """Validations without a better `train.best_metric` after which training stops early. null = never."""
    tracker: Literal["wandb", "mlflow", "clearml"] | None = None
    """Experiment tracker that also gets all metrics; its package must be installed. null = none."""

    @property
    def micro_batch(self) -> int:
        """The clips of a micro-batch."""
        return self.batch // self.accumulate

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled. `auto` waits for a measurement on a GPU."""
        return self.compile == "on"

    @model_validator(mode="after")
    def _check_schedule_and_batch(self) -> TrainConfig:
        if self.warmup_epochs > self.epochs:
            raise ConfigError(f"train.warmup_epochs: {self.warmup_epochs:g} is more than train.epochs {self.epochs}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0.0):
            raise ConfigError(
                f"train.nesterov: needs train.optimizer=sgd and train.momentum above 0, got {self.optimizer} and "
                f"{self.momentum:g}; set train.nesterov=false"
            )
        if self.patience is not None and not self.validate_every:
            raise ConfigError("train.patience: needs validations; set train.validate_every=1, or train.patience=null")
        if self.freeze is not None and self.init is None:
            raise ConfigError("train.freeze: random weights would be frozen; set train.init, or train.freeze=null")
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

    bandwidth_gbps: Positive = 100.0
    """Gigabits per second from one rank to the next."""
    macs_per_s: Annotated[float, Field(ge=1.0, le=1e21)] | None = None
    """Multiply-adds that a rank computes per second in training. null = measured on this machine."""
    clips: Annotated[int, Field(ge=1, le=10**12)] | None = None
    """Clips in an epoch. null = the number in the manifest."""


class LabelConfig(Section):
    """Stage 2: the clips and the rule for the labels."""

    source: Literal["train", "holdout", "teacher"] = "train"
    """Clips that get labels. `train`: those that stage 1 trains on. `holdout`: those of `data.holdout`, which it has
    not seen. `teacher`: both, and a point is right if it agrees with the costliest point."""
    none_right: Literal["longest", "cheapest", "exclude"] = "longest"
    """Label of a clip on which no point is right: the `longest` (costliest) point, the `cheapest`, or `exclude` to
    leave the clip out."""


class AssignConfig(Section):
    """The assigner, a small network on a few low-resolution frames, and its training."""

    family: Literal["efficientnet", "convolutions"] = "efficientnet"
    """The network. `efficientnet`: EfficientNet-B0 on each frame (ReViT). `convolutions`: convolutions with stride 2 on
    all frames at once, several times as fast, for models so small that the time of the assigner counts."""
    frames: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Frames of a clip that the assigner sees; at most `model.num_frames`. Left out: 4 (ReViT), or all frames of a clip
    that has fewer."""
    size: Pixels = 112
    """Side of a frame in pixels."""
    channel_multiplier: Annotated[float, Field(ge=0.01, le=100.0)] = 0.5
    """Width of the network. 1 = the width of EfficientNet-B0, or 32 channels in the first of the convolutions."""
    stages: Annotated[int, Field(ge=1, le=7)] = 7
    """Number of stages of EfficientNet-B0 that are used, from the first, or number of convolutions."""
    epochs: Count = 30
    """Passes over the labelled clips."""
    batch: Count = 64
    """Clips of a step."""
    lr: Positive = 1e-3
    """Highest learning rate of AdamW."""
    weight_decay: Weight = 0.02
    """Weight decay of AdamW."""
    loss: Literal["ce", "expected_cost"] = "ce"
    """`ce`: cross-entropy with the labels (ReViT). `expected_cost`: the mean cost of the chosen points, wrong
    predictions included."""
    mu: Weight = 2.0
    """Cost of a wrong prediction in `assign.loss: expected_cost`, in units of the costliest point's cost."""
    select: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Fraction of the labelled clips that are not trained on. On them the threshold is chosen."""
    tolerance: Fraction = 0.005
    """Accuracy that may be lost on these clips, compared with the costliest point: 0.005 is half a percentage point."""


class CalibrateConfig(Section):
    """The promise of `calibrate`, on the videos of `data.calibrate` (docs/calibrate.md)."""

    eps: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Most accuracy that the policy may lose against the costliest point: 0.01 is one percentage point. The cheapest
    such policy is chosen."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Probability that the promise may be broken: 0.1 is a confidence of 90 %."""
    cost: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Promise a cost instead: the mean MACs of a video are at most this fraction of the costliest point's. The most
    accurate such policy is chosen. null = promise `calibrate.eps`."""


class EvaluateConfig(Section):
    """The views of a video, the policies, and the measurement of speed. Kinetics: 1 clip x 3 crops.

    `calibrate` and `predict` use the same views and the same mean; `label` uses one clip of a video.
    """

    temporal_views: Count = 1
    """Clips of a video, spread over its length."""
    single_clip: Literal["centre", "start"] = "centre"
    """Place of the clip if `evaluate.temporal_views` is 1: the centre of the video, or its start (frame 0)."""
    spatial_crops: Count = 3
    """Crops of a clip. 1 = the centre, 3 = also both ends of the long side."""
    crop_offset: Literal["round", "ceil"] = "round"
    """Place of a crop between two pixels: the even one (`round`), or the next one (`ceil`)."""
    average: Average = "probabilities"
    """Mean over the views of a video: of their probabilities, or the softmax of the mean of their logits."""
    crop_pct: Annotated[float, Field(ge=0.01, le=1.0)] = 1.0
    """Side of the crop divided by the short side of the resized frame. DeiT: 0.875. 1 = no border."""
    batch: Literal["auto"] | Count = "auto"
    """Views of a forward pass. `auto`: by the size of the point, and by the free memory of a GPU; when the speed is
    measured, the fastest of a few sizes."""
    failed: Literal["wrong", "exclude"] = "wrong"
    """A video that cannot be read counts as `wrong`, or is left out of all figures (`exclude`)."""
    speed_seconds: Annotated[float, Field(ge=0.0, le=1e6)] = 60.0
    """Longest time for measuring the speed, in seconds, for all policies together. 0 = not measured. If the time does
    not suffice for `evaluate.speed_clips`, fewer clips are measured. It is exceeded by one pass of one policy at most.
    """
    speed_clips: Annotated[int, Field(ge=0, le=1_000_000)] = 64
    """Most clips for measuring the speed. 0 = not measured."""
    speed_repeats: Count = 7
    """Most rounds of the measurement of speed, after one to warm up. In a round, each policy runs all clips once."""
    cascade: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Cascades to evaluate, POINTS:THRESHOLDS, for example `8@0.5,14@0.7:0.6` or `8@0.5,14@0.7:cost=0.4`; over
    the views of a video `14:views:0.9` (docs/points.md)."""
    leap: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Leaps to evaluate, POINT:cost=FRACTION or POINT:price=NUMBER, for example `7:cost=0.5`. They are fitted to the
    labels of the run (docs/points.md)."""

    @property
    def views(self) -> int:
        """The views of a video."""
        return self.temporal_views * self.spatial_crops


class ExportConfig(Section):
    """What `export` writes, and how it is checked (docs/export.md)."""

    formats: Annotated[tuple[Format, ...], BeforeValidator(_as_list)] = ("onnx", "torch", "pretrained")
    """What is written. `onnx`: each point and the assigner as ONNX, with a router. `torch`: the same graphs of
    torch.export. `pretrained`: one folder with model, assigner, policy and model card, for `from_pretrained`."""
    point: str | None = None
    """A point to cut out as a plain TimeSformer, which Hugging Face's class loads. Nothing else is written then. null =
    no such cut."""
    policy: str | None = None
    """Policy of the exported model, as `predict --policy`. null = the calibrated one if there is one, otherwise the
    assigner's, otherwise the costliest point."""
    opset: Annotated[int, Field(ge=18, le=24)] = 18
    """Version of the ONNX operators. A higher one needs a newer onnxruntime."""
    clips: Annotated[int, Field(ge=0, le=10_000)] = 8
    """Clips on which the exported graphs are compared with the model: of the split val, or train without one. 0 =
    random pixels, where the videos are not at hand."""
    tolerance: Positive = 1e-4
    """Largest difference of a logit between an exported graph and the model. A larger one ends `export`, and nothing is
    written."""


class ParallelConfig(Section):
    """The ranks of a stage, the groups of ranks that train a length, and the shards of an array of jobs."""

    groups: Annotated[Literal["auto"] | dict[str, Count] | None, WrapValidator(_check_groups_type)] = None
    """Number of ranks of each length, such as {14: 4, 10: 2, 7: 1} or {14: 2, 10+7: 1}. `auto` = balanced by cost. null
    = every rank trains every point."""
    decode: Literal["own", "shared"] = "shared"
    """With `parallel.groups`. `shared`: each clip is decoded by one rank, which sends it to the ranks that train it.
    `own`: each group decodes every clip, for networks of 1 Gbit/s and less."""
    sums: Literal["fp32", "bf16"] = "fp32"
    """In which gradients travel between ranks and are summed. bf16 halves the traffic and keeps 8 bits of a gradient.
    Its effect on accuracy has not been measured."""
    overlap: Literal["auto", "off"] = "off"
    """The gradients are summed during the last backward pass of a step. `off`: that at the cheapest point. `auto`: on
    GPUs that at the costliest point, if training then is faster by 2 % or more, as times before the first step say. It
    keeps the activations of two points (`videoadapt plan` prints the memory), and has not run on GPUs yet."""
    ranks: Count | None = None
    """Required number of ranks; another number is an error. null = as many as the launcher has started."""
    join_s: Seconds = 600.0
    """Seconds in which all ranks must have started. The nodes of a job import torch from a busy disk at very different
    speeds."""
    step_s: Seconds = 1800.0
    """Seconds that a rank waits for the others in a training step, loading included."""
    shard: str | None = None
    """I/N, such as 0/4: label, calibrate and evaluate score only shard I of N of the videos. null = all videos."""

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

    stage: Literal["train", "label", "assign", "calibrate", "evaluate", "all"] = "all"
    """Stage to start; `all` = train, label, assign, calibrate (if `data.calibrate` is set) and evaluate, in this order.
    Without label and assign if there is one point, or `label.source` is `teacher` and `data.holdout` 0."""
    cluster: Literal["slurm", "local"] = "slurm"
    """Where: SLURM, or `local` = on this machine, one stage after the other."""
    shards: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Jobs in the arrays of label, calibrate and evaluate. 1 = no array."""


class ServeConfig(Section):
    """The local page of `videoadapt serve`, and what it accepts."""

    port: Annotated[int, Field(ge=0, le=65_535)] = 8765
    """Port of the page on this machine, which no other machine can reach. 0 = any free port."""
    max_mb: Annotated[float, Field(ge=1e-3, le=1e5)] = 200.0
    """Largest file that the page accepts, in megabytes."""
    max_seconds: Seconds = 120.0
    """Longest video that the page accepts, in seconds."""
    timeout_s: Seconds = 60.0
    """Seconds in which a video must have been read. After that it is refused."""
    readers: Annotated[int, Field(ge=1, le=64)] = 2
    """Videos that are read at the same time, each in a process of its own. The model runs on one after the other."""
    queue: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Most videos that the page handles or keeps waiting. Further ones are refused until one is answered."""

"""The code blocks of README and docs, and how the tests run them: what is made small, and what is not run, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
HISTORY = {"docs/log.md", "CHANGELOG.md"}  # dated texts keep the commands of their day
LANGUAGES = {"bash", "python", "yaml", "text", ""}  # the last two: output, and trees of folders
# A command that hides in a block without language, or in one of another language.
COMMAND = re.compile(r"^\s*\$? ?(videoadapt|python3?|make|pip|torchrun|sbatch|srun|export) \S", re.MULTILINE)
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block of a page, or a code cell of a notebook."""

    page: str
    line: int  # of its first line, from 1; the number of the cell in a notebook
    language: str
    text: str

    @property
    def first(self) -> str:
        """The first line that is not empty."""
        return next((line for line in self.text.splitlines() if line.strip()), "")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def page_names() -> list[str]:
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    return sorted({path.relative_to(ROOT).as_posix() for path in paths} - HISTORY)


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = enumerate(json.loads(text)["cells"], 1)
        return [Block(page, at, "python", "".join(cell["source"])) for at, cell in cells if cell["cell_type"] == "code"]
    found = []
    for match in FENCE.finditer(text):
        indent, language, content = match.groups()
        lines = [line.removeprefix(indent) for line in content.splitlines(keepends=True)]
        found.append(Block(page, text.count("\n", 0, match.start()) + 2, language.strip(), "".join(lines)))
    return found


def command_lines(text: str) -> list[str]:
    """The lines of a shell block. A line that ends in a backslash continues on the next."""
    return text.replace("\\\n", "").splitlines()


@dataclass(frozen=True)
class Page:
    """How the blocks of one page run: in order, in a folder with data, a finished run, and its config `CONFIG`."""

    small: str = ""  # overrides for every command with a config
    replaced: Mapping[str, str] = field(default_factory=dict)  # texts of the blocks, replaced before they run
    copies: Mapping[str, str] = field(default_factory=dict)  # files that the page names: copies of files in the folder
    not_run: Mapping[str, str] = field(default_factory=dict)  # beginnings of lines, with the reason
    blocks_not_run: Mapping[str, str] = field(default_factory=dict)  # beginnings of whole blocks, with the reason


KINETICS = "needs Kinetics-400"
IMAGENET = "needs ImageNet, and weeks"
MINUTES = "takes minutes"

# Any config becomes a tiny one that trains on the data of the folder.
SMALL_DATA = (
    "data.root=data data.train.annotations=data/train.csv data.val.annotations=data/val.csv "
    "data.classes=data/classes.txt data.workers=0 data.holdout=0.4 model.num_classes=12"
)
SMALL_MODEL = "model.width=32 model.heads=2 model.depth=2 model.num_frames=2 model.stride_frames=2"
SMALL_IMAGE_MODEL = f"{SMALL_MODEL} model.num_frames=1 model.drop_blocks=[1] assign.frames=1"
SMALL_STAGES = (
    "run.device=cpu run.precision=fp32 train.init=null train.epochs=1 train.warmup_epochs=0 train.batch=8 "
    "train.schedule=cosine train.milestones=[] assign.epochs=1 assign.size=32 assign.frames=2 assign.stages=1 "
    "assign.channel_multiplier=0.25 label.source=holdout evaluate.spatial_crops=1 evaluate.speed_clips=0"
)
SMALL = f"{SMALL_DATA} {SMALL_MODEL} {SMALL_STAGES}"

PAGES = {
    "README.md": Page(
        small=SMALL.replace("speed_clips=0", "speed_clips=4 evaluate.speed_repeats=1"),
        replaced={
            "/data/k400": "data",
            " ...": "",
            "--data videos --weights vit_small_patch14_dinov2.safetensors": "--data data",
            '"model.points=[14,7]"': '"model.points=[14,7]", "model.width=96", "model.depth=2"',
        },
        copies={"runs/demo": "runs/mine", "a.mp4": "video.mp4", "b.mkv": "video.mp4", "clip.mp4": "video.mp4"},
        not_run={
            "make demo": "CI runs the demo as tests/commands/test_demo.py",
            "make test": "CI runs it",
            "python3 -m venv": "tests/test_install.py makes an environment",
            "pip install": "tests/test_install.py installs the checkout",
        },
    ),
    "docs/data.md": Page(
        small=SMALL,
        replaced={"fixed:14": "fixed:8"},
        copies={"runs/a": "runs/mine", "runs/b": "runs/mine"},
        not_run={
            "sed": KINETICS,
            "videoadapt index CONFIG data.root=/data/kinetics400": KINETICS,
            "videoadapt train configs/revit_deit_s_in1k.yaml": IMAGENET,
        },
    ),
    "docs/export.md": Page(
        small="export.clips=4",
        replaced={"export.formats=onnx export.policy=fixed:8": "export.formats=pretrained export.policy=fixed:8"},
        not_run={
            "pip install": "tests/test_install.py installs the checkout",
            "videoadapt export runs/mine export.point=8  ": "the last section of the page runs it",
        },
    ),
    "docs/finetune.md": Page(
        small=SMALL_STAGES,
        replaced={
            "--data videos --weights vit_small_patch14_dinov2.safetensors": (
                "--data data data.holdout=0.4 data.workers=0 model.width=32 model.heads=2 model.depth=2 "
                "model.num_frames=2 model.size=64 'model.points=[4,2]'"
            ),
            "clip.mp4": "video.mp4",
            "nproc-per-node=4": "nproc-per-node=2",
        },
        not_run={"videoadapt launch": "needs a cluster; tests/commands/test_slurm_jobs.py submits"},
    ),
    "docs/calibrate.md": Page(
        small=SMALL_STAGES,
        replaced={
            "data.calibrate=0.1": "data.calibrate=0.3",
            "calibrate.eps=0.01": "calibrate.eps=0.9 calibrate.delta=0.5",
            "clip.mp4": "video.mp4",
        },
        not_run={
            "python tools/simulate_calibration.py": f"{MINUTES}; tests/tools/test_simulate_calibration.py",
        },
    ),
    "docs/python.ipynb": Page(blocks_not_run={"": "tests/test_python.py runs it in a kernel"}),
    "docs/python.md": Page(copies={"config.yaml": "CONFIG", "clip.mp4": "video.mp4"}),
    "docs/points.md": Page(
        small=SMALL_IMAGE_MODEL,
        replaced={"rounds=15 'batches=[1,8]'": "rounds=1 'batches=[1]'"},
    ),
    "docs/report.md": Page(copies={"runs/other": "runs/mine"}),
    "docs/reference.md": Page(
        replaced={
            "nproc-per-node=4": "nproc-per-node=2",
            "CONFIG ...": "CONFIG",
            "/data/k400 ": "data ",
            "/data/k400_320": "data_320",
        },
        not_run={
            "python tools/evaluate_released.py": "needs released weights",
            "python tools/bench_train.py": f"{MINUTES}; tests/tools/test_bench_train.py",
            "python tools/gpu_check.py": "needs a GPU",
        },
    ),
    "docs/reliability.md": Page(not_run={"python tools/fuzz_inputs.py": f"{MINUTES}; tests/tools/test_fuzz_inputs.py"}),
    "docs/reproduce.md": Page(
        replaced={
            "data.train.annotations=imagenet/train": "data.train.annotations=data/train.csv",
            "data.val.annotations=imagenet/val": "data.val.annotations=data/val.csv",
        },
        not_run={
            "python tools/evaluate_released.py": "needs released weights",
            "videoadapt bench points": "needs the papers' GPUs; docs/points.md runs the command",
            "videoadapt evaluate configs/": "needs models trained on ImageNet",
        },
    ),
    "docs/serve.md": Page(
        not_run={
            "pip install": "tests/test_install.py installs the checkout",
            "videoadapt serve": "runs until Ctrl-C; tests/commands/test_serve.py opens the page",
            "python tools/serve_screenshots.py": "needs the demo's run",
        },
        blocks_not_run={"import videoadapt": "tests/commands/test_serve.py runs it in a process of its own"},
    ),
    "docs/slurm.md": Page(
        replaced={
            "srun --cpus-per-task=16 ": "",
            "slurm.tasks_per_node=8 launch.stage=all": "slurm.tasks_per_node=4 launch.stage=all",  # a batch has 8 clips
        },
        not_run={
            "videoadapt launch CONFIG": "needs a cluster; tests/commands/test_slurm_jobs.py submits",
            "python -c": "downloads weights",
        },
    ),
    "docs/results/assigner.md": Page(
        not_run={"OMP_NUM_THREADS=1 python tools/bench_assigner.py": f"{MINUTES}; no test runs it"}
    ),
    "docs/results/bench_data.md": Page(
        not_run={"videoadapt bench data": f"{MINUTES}; tests/performance/test_bench.py runs it at small size"}
    ),
    "docs/results/bench_points.md": Page(
        small=SMALL_IMAGE_MODEL,
        replaced={"rounds=5": "rounds=1", "batches=[8]": "batches=[1]"},
        not_run={"videoadapt bench points configs/supervit_deit_s_in1k.yaml": "docs/points.md runs it"},
    ),
    "docs/results/bench_train.md": Page(
        not_run={"python tools/bench_train.py": f"{MINUTES}; tests/tools/test_bench_train.py"}
    ),
    "docs/results/fights.md": Page(
        small=f"{SMALL} evaluate.cascade=[]",  # over views, of which `SMALL` has one
        replaced={"FIGHTS=...": "FIGHTS=data", "VIT_S=...": "VIT_S=none"},
        not_run={
            "videoadapt train configs/fights.yaml run.dir=runs/fights_frozen": MINUTES,
            "for verb in label assign;": MINUTES,
            "videoadapt evaluate runs/fights_frozen": MINUTES,
        },
    ),
    "docs/results/gpu.md": Page(not_run={"python tools/gpu_check.py": "needs a GPU"}),
    "docs/results/grid.md": Page(
        small=f"{SMALL} model.drop_blocks=[1]",
        replaced={"FIGHTS=... VIT_S=...": "FIGHTS=data VIT_S=none"},
        not_run={"videoadapt demo": "tests/commands/test_demo.py runs it"},
    ),
    "docs/results/photos.md": Page(
        not_run={
            "python tools/split_trashnet.py": "needs the photographs; tests/tools/test_split_trashnet.py",
            "python tools/record_run.py": "tests/tools/test_record_run.py runs it",
            "python tools/probe_routing.py": "needs the trained run; tests/tools/test_probe_routing.py",
            "for verb in": MINUTES,
            "videoadapt": MINUTES,
            "OMP_NUM_THREADS=1 torchrun": MINUTES,
        },
    ),
    "docs/results/router.md": Page(not_run={"python tools/bench_router.py": f"{MINUTES}; no test runs it"}),
    "docs/results/step.md": Page(
        not_run={
            "python tools/count_step.py": "tests/tools/test_count_step.py counts a small model",
            "PYTHONPATH=": "needs a checkout of an earlier commit",
            "videoadapt bench model": "tests/performance/test_bench_model.py runs it",
            "python tools/bench_train.py": f"{MINUTES}; tests/tools/test_bench_train.py",
        }
    ),
    "docs/results/shared_decoding.md": Page(
        not_run={"python tools/bench_shared_decoding.py": f"{MINUTES}; no test runs it"}
    ),
}


def starting(starts: Mapping[str, str], line: str) -> str | None:
    """The entry of `starts` with which a line begins."""
    return next((start for start in starts if line.strip().startswith(start)), None)


def executed(page: Page, block: Block) -> str:
    """The text of a block as it runs: lines that are not run are left out, texts that are replaced are replaced."""
    if starting(page.blocks_not_run, block.first) is not None:
        return ""
    lines = [line for line in command_lines(block.text) if starting(page.not_run, line) is None]
    text = "\n".join(lines) if block.language == "bash" else block.text
    for old, new in page.replaced.items():
        text = text.replace(old, new)
    return text


def lines_not_run(page: Page, block: Block) -> list[str]:
    """The lines of a shell block that `executed` leaves out."""
    lines = command_lines(block.text)
    whole = starting(page.blocks_not_run, block.first) is not None
    return lines if whole else [line for line in lines if starting(page.not_run, line) is not None]


def unused(page: Page, blocks: Sequence[Block]) -> list[str]:
    """The entries of a page's settings that no block of the page has."""
    code = [block for block in blocks if block.language in {"bash", "python"}]
    firsts = [block.first for block in code]
    lines = [line for block in code for line in command_lines(block.text)]
    text = "\n".join(lines)
    return [
        *(start for start in page.not_run if not any(line.strip().startswith(start) for line in lines)),
        *(start for start in page.blocks_not_run if not any(first.strip().startswith(start) for first in firsts)),
        *(old for old in page.replaced if old not in text),
        *(name for name in page.copies if name not in text),
    ]

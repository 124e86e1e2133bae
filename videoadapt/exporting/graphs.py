"""Graphs of the points and of the assigner: uint8 pixels in, logits or probabilities out, with any batch size.

Everything between the cut pixels and the answer is inside the graph (normalising, resizing to the point's length), so
that another program cannot do it differently. Graphs are traced on the CPU in float32, where the model runs plain torch
operations: Triton kernels run on CUDA alone (`model/attention.has_kernel`).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from videoadapt.errors import UserError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner

if TYPE_CHECKING:
    import onnx

WEIGHTS = "weights.bin"  # the weights of all ONNX files of a folder
_PAGE = 4096  # bytes; a tensor that begins at a page can be mapped into memory
_LARGE = 1024  # bytes; smaller tensors stay in the ONNX file
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class PointGraph(nn.Module):
    """The model at one point.

    Args:
        model: The model, on the CPU in float32 and in eval mode.
        point: One of its points.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: TimeSformer, point: str) -> None:
        super().__init__()
        self.model, self.point = model, point
        # Buffers become constants of the graph. `views.normalise` makes its numbers anew in each call.
        mean, std = (
            torch.tensor(values).mul(255).view(-1, 1, 1, 1) for values in (model.config.mean, model.config.std)
        )
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        """Maps uint8 clips `(B, C, T, S, S)` to float32 logits `(B, classes)`."""
        normalised = (clips.to(torch.float32) - self.mean) / self.std  # as `views.normalise`
        logits: Tensor = self.model(normalised, self.point)
        return logits


class AssignerGraph(nn.Module):
    """The assigner with its softmax.

    Args:
        assigner: The network, on the CPU in float32 and in eval mode.
    """

    def __init__(self, assigner: Assigner) -> None:
        super().__init__()
        self.assigner = assigner

    def forward(self, thumbnails: Tensor) -> Tensor:
        """Maps uint8 thumbnails `(B, C, A, s, s)` to the probability of each point to be the label, `(B, points)`."""
        probabilities: Tensor = self.assigner(thumbnails).softmax(-1)
        return probabilities


def graphs_of(model: TimeSformer, assigner: Assigner | None) -> dict[str, tuple[nn.Module, Tensor]]:
    """Returns the graphs of a model by name, each with an example of its input.

    The names are the points, and `assigner`. The modules are the model's own, not copies.
    """
    config = model.config
    # Two clips: torch.export takes a size of 1 for a constant.
    clips = torch.zeros(2, 3, config.num_frames, config.size, config.size, dtype=torch.uint8)
    graphs: dict[str, tuple[nn.Module, Tensor]] = {p: (PointGraph(model, p).eval(), clips) for p in config.points}
    if assigner is not None:
        size, frames = assigner.config.size, assigner.config.frames
        thumbnails = torch.zeros(2, 3, frames, size, size, dtype=torch.uint8)
        graphs["assigner"] = (AssignerGraph(assigner).eval(), thumbnails)
    return graphs


def traced(graph: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Traces a graph with `torch.export`; the batch size stays free, all other sizes are those of the example."""
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)
    with torch.no_grad(), _quiet():
        return torch.export.export(graph, (example,), dynamic_shapes=({0: batch},), strict=False)


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes a traced graph for `torch.export.load`."""
    with _quiet():
        torch.export.save(program, path)


def load_program(path: Path) -> nn.Module:
    """Loads a graph that `save_program` wrote."""
    with _quiet():
        return torch.export.load(path).module()


def to_onnx(program: torch.export.ExportedProgram, name: str, opset: int) -> onnx.ModelProto:
    """Translates a traced graph to ONNX.

    Args:
        program: A graph of `traced`.
        name: `assigner`, or a point. It names the input and the output.
        opset: Version of ONNX's operators.
    """
    require_onnx()
    names = ("thumbnails", "probabilities") if name == "assigner" else ("clips", "logits")
    with _quiet():
        translated = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=names[:1],
            output_names=names[1:],
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
            verbose=False,
        )
    assert translated is not None, "with dynamo and without a path, a program is returned"
    proto = translated.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"  # torch numbers it: s7
    del proto.graph.value_info[:]  # shapes of inner tensors with the old name; onnxruntime infers them
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]  # the Python stack of each node: most of the file, with paths of this machine
    return proto


def _stable_sort() -> Callable[..., Any]:
    """Returns the translation of torch's stable sort, which token dropping uses and torch.onnx does not know.

    Of equal values, ONNX's TopK takes the one with the lower index first, as the stable sort does.
    """
    from onnxscript import opset18

    op: Any = opset18  # its types do not know that a shape is int64

    def sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001 - aten's
        count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))  # (1,)
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    return sort


def save_onnx(folder: Path, models: Mapping[str, onnx.ModelProto]) -> None:
    """Writes ONNX files, and beside them their weights: equal tensors of different graphs are stored once.

    The points of a model share attention and MLP, so that the files together take little more than one of them.

    Args:
        folder: An existing folder.
        models: By file name. Their large tensors are moved out of them.
    """
    import onnx

    places: dict[str, tuple[int, int]] = {}  # offset and length of each tensor by the hash of its bytes
    with (folder / WEIGHTS).open("wb") as file:
        for model in models.values():
            for tensor in model.graph.initializer:
                content = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(content) < _LARGE:
                    continue
                digest = hashlib.sha256(content).hexdigest()
                if digest not in places:
                    file.write(bytes(-file.tell() % _PAGE))
                    places[digest] = (file.tell(), len(content))
                    file.write(content)
                _point_to(tensor, *places[digest])
    for name, model in models.items():
        onnx.save_model(model, folder / name)
        onnx.checker.check_model(folder / name, full_check=False)


def _point_to(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    """Replaces the content of a tensor by its place in `WEIGHTS`."""
    import onnx

    name, kind, shape = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = name, kind, onnx.TensorProto.EXTERNAL
    tensor.dims.extend(shape)
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def onnx_function(path: Path) -> Callable[[Tensor], Tensor]:
    """Loads an ONNX file with onnxruntime, on the CPU, as a function of tensors."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def require_onnx() -> None:
    """Raises `UserError` with the line to install it, if a package of the extra `export` is missing."""
    import importlib.util

    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"export: ONNX needs {', '.join(missing)}; run `pip install 'videoadapt[export]'`, or leave onnx out of "
            "export.formats"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings that torch gives about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

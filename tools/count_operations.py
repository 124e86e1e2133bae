"""Counts what a GPU would do, without a GPU: operations, the bytes that they read and write, and waits of the host.

Tensors are torch's fake tensors: they have a device and a shape, and no data. `counting` runs code on such tensors on
CUDA, with its backward passes and autocast, on a machine without a driver.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# They allocate or rename memory, and touch no number. All other operations without a launch are views.
_FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "empty", "empty_like", "empty_strided"}
_FREE |= {"new_empty", "new_empty_strided", "_fused_sdp_choice", "resize_"}
# They write their first argument without reading it.
_OVERWRITE = {"copy_", "fill_", "zero_", "bernoulli_", "uniform_", "normal_", "_foreach_copy_", "_foreach_zero_"}
# Operations that launch more than one kernel: zeros and a copy; a kernel and two sums of `kernels/add_norm.py`.
_LAUNCHES = {"slice_backward": 2, "select_backward": 2, "index_backward": 2, "add_norm_backward": 3}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
_VALUES = {"_local_scalar_dense", "item", "is_nonzero"}
_WAITS = _VALUES | {"nonzero", "equal", "masked_select", "unique_consecutive"}


@dataclass
class Count:
    """What some code did on its device, by name of operation.

    Attributes:
        launches: Kernel launches.
        bytes: Read and written. A broadcast number counts once.
        waits: How often the host waited for the device.
    """

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    waits: int = 0

    def add(self, name: str, launches: int, size: int) -> None:
        """Adds an operation."""
        self.launches[name] += launches
        self.bytes[name] += size

    def reset(self) -> None:
        """Forgets all operations so far."""
        self.launches.clear()
        self.bytes.clear()
        self.waits = 0

    @property
    def traffic(self) -> int:
        """The bytes outside matrix products, convolutions and attention."""
        return sum(size for name, size in self.bytes.items() if not is_product(name))


def is_product(name: str) -> bool:
    """Returns whether an operation is a matrix product, a convolution or an attention."""
    return name in _PRODUCTS or "attention" in name or "attend" in name


@contextmanager
def counting(device: torch.device) -> Iterator[Count]:
    """Runs the body on fake tensors, and counts the operations on `device`.

    The body makes its tensors itself, or takes modules through `faked`. A value that it reads is 1; of `any`, 0.
    """
    with ExitStack() as stack:
        if device.type == "cuda" and not torch.cuda.is_available():
            # Without a driver torch would disable autocast, and forbid streams.
            stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
            stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
            stack.enter_context(mock.patch("torch.cuda.current_stream", lambda *_: mock.MagicMock()))
        for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
            # torch treats many tensors in one launch, if their type is one that it knows.
            types = [Tensor, nn.Parameter, FakeTensor]
            stack.enter_context(mock.patch(f"{module}._foreach_supported_types", types))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_FusedAttention())
        counter = stack.enter_context(_Counter(device))
        yield counter.count


def faked(module: nn.Module, device: torch.device) -> nn.Module:
    """Moves a module of the meta device to a fake device. Inside `counting`."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.must_hide = True  # type: ignore[attr-defined]
        # The node that accumulates the gradient is made now: it, too, asks for the device, see `_Counter._device`.
        parameter.accumulator = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[attr-defined, union-attr]
    return module


class _FusedAttention(TorchFunctionMode):
    """Chooses the kernel of `scaled_dot_product_attention` on CUDA, for which torch would ask the driver."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and args[0].device.type == "cuda" and not kwargs:
            if args[0].dtype in {torch.float16, torch.bfloat16}:
                return aten._scaled_dot_product_flash_attention(*args)[0]
            return aten._scaled_dot_product_efficient_attention(*args, None, torch.is_grad_enabled())[0]
        return func(*args, **kwargs)


class _Counter(TorchDispatchMode):
    """Counts each operation below autograd and autocast."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.count = device, Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return self._device(args[0])
        name = func._schema.name.split("::")[1]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is aten._to_copy.default and not _changes(inputs[0], kwargs):
            return aten.alias.default(inputs[0])  # autograd saw another device
        if name in _WAITS and any(tensor.device == self.device for tensor in inputs):
            self.count.waits += 1
        if name in _VALUES:
            return 0 if getattr(inputs[0], "is_any", False) else 1
        # torch does not know the fused optimizers on tensors without data. They return nothing.
        out = None if name.startswith("_fused_") else func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(tensor.requires_grad for tensor in inputs):
            for tensor in outputs:
                tensor.must_hide = True  # type: ignore[attr-defined]
        for tensor in outputs if name == "any" else ():
            tensor.is_any = True  # type: ignore[attr-defined] # such as "any loss is not finite"
        if func.is_view or name in _FREE:
            return out
        devices = {tensor.device.type for tensor in (*inputs, *outputs) if tensor.ndim or name in {"copy_", "_to_copy"}}
        if self.device.type in devices:
            is_copy = name in {"copy_", "_to_copy"} and "cpu" in devices and len(devices) > 1
            self.count.waits += is_copy and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))  # noqa: PLR2004
            self.count.add(name, _LAUNCHES.get(name, 1), _size(func, (args, kwargs), inputs, outputs))
        return out

    def _device(self, tensor: Tensor) -> torch.device:
        """Returns what autograd sees as the device of a tensor: once, and in backward passes, the meta device.

        Autograd asks for it when it records an operation. With a real device it would later ask the driver for
        streams. Autocast asks afterwards, and must see the real device.
        """
        hidden = self.device.type == "cuda" and (
            torch._C._current_graph_task_id() != -1
            or (torch.is_grad_enabled() and tensor.__dict__.pop("must_hide", False))
        )
        return torch.device("meta") if hidden else tensor.fake_device  # type: ignore[attr-defined]


def _changes(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    """Returns whether `_to_copy` changes the dtype, the device or the order of the numbers."""
    other = kwargs.get("dtype") not in {None, tensor.dtype} or kwargs.get("device") not in {None, tensor.device}
    return other or kwargs.get("memory_format") not in {None, torch.preserve_format}


def _size(func: Any, arguments: tuple[Any, Any], inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Returns the bytes that an operation reads and writes."""
    (args, kwargs), name = arguments, func._schema.name.split("::")[1]
    if name in {"slice_backward", "select_backward", "index_backward"}:  # zeros, and a copy into them
        return _bytes(outputs) + 2 * _bytes(inputs[:1])
    given = [*args, *(kwargs.get(argument.name) for argument in func._schema.arguments[len(args) :])]
    changed = [
        leaf
        for argument, value in zip(func._schema.arguments, given, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor)
    ]
    ids = set(map(id, changed))
    written = _bytes(changed) + _bytes([tensor for tensor in outputs if id(tensor) not in ids])
    return written + _bytes([tensor for tensor in inputs if not (name in _OVERWRITE and id(tensor) in ids)])


def _bytes(tensors: list[Tensor]) -> int:
    return sum(
        t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
        for t in tensors
    )

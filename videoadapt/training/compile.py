"""`train.compile`: compiled forward passes, which go on eagerly if the compiler fails."""

from __future__ import annotations

from typing import Any

import torch._dynamo.exc
from torch import nn

from videoadapt.model.timesformer import TimeSformer, compiled
from videoadapt.runtime.console import say


class Compiled:
    """A compiled forward pass. If the compiler fails, it says so in one line, and the module runs as it is."""

    def __init__(self, module: nn.Module, model: TimeSformer) -> None:
        """Compiles nothing yet: torch compiles each point in its first pass.

        Args:
            module: What is compiled: the model, or DDP around it, so that DDP's sums overlap the backward pass.
            model: The model.
        """
        self._module = module
        self._forward = compiled(model, module)
        # The graph of the backward pass is compiled with that of the forward pass, where its failure can be caught.
        torch._functorch.config.force_non_lazy_backward_lowering = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        try:
            return self._forward(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            say(f"train.compile: the compiler failed ({reason}); training goes on without it")
            self._forward = self._module
            return self._module(*args, **kwargs)

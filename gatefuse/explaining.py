"""A real call of a model, compiled anew with gatefuse, and what was fused in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gatefuse import fakes
from gatefuse.backend import gatefuse_backend
from gatefuse.model_gates import GateCounter
from gatefuse.recording import record
from gatefuse.report import Report
from gatefuse.scanning import scan_call
from gatefuse.stored import graph_caches_off

__all__ = ["explain"]


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Compile ``model`` with gatefuse, call it once with the arguments, and tell what was fused.

    The call is a real one, on whatever device the model is, in the grad mode of the caller; if its
    result requires grad, the backward graph is compiled too, without touching any ``.grad``.
    PyTorch's caches of graphs are off for it, so every site and rejection is seen. Compilations
    made before are left alone. Options come from the environment, or from a surrounding
    :func:`gatefuse.fusing`.

    A model or arguments without data, on the meta device or fake, are scanned instead
    (:func:`gatefuse.scan`), for the GPU if there is one.

    Raises TypeError if ``model`` cannot be called.
    """
    if not callable(model):
        raise TypeError(
            f"gatefuse: model is of type {type(model).__name__}; expected a module or a function"
        )

    if any(map(fakes.has_no_data, _tensors(model, args, kwargs))):
        return scan_call(
            model, args, kwargs, device=None, grad=torch.is_grad_enabled(), train_mode=None
        )

    # A backend of its own makes Dynamo compile every frame anew.
    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        counter.see(gm)
        return gatefuse_backend(gm, example_inputs)

    counter = GateCounter(model)

    with (
        record() as result,
        graph_caches_off(),
        torch._dynamo.config.patch(recompile_limit=64),
    ):
        if isinstance(model, torch.nn.Module) and model._compiled_call_impl is not None:
            # After model.compile() a call of the model would run what was compiled then.
            compiled = torch.compile(model._call_impl, backend=backend)
        else:
            compiled = torch.compile(model, backend=backend)
        out = compiled(*args, **kwargs)
        leaves = [
            t
            for t in torch.utils._pytree.tree_leaves(out)
            if isinstance(t, torch.Tensor) and t.requires_grad
        ]
        inputs = [t for t in _tensors(model, args, kwargs) if t.requires_grad]
        if leaves and inputs:
            ones = [torch.ones_like(t) for t in leaves]
            try:
                torch.autograd.grad(leaves, inputs, ones, allow_unused=True)
            except RuntimeError as e:
                if "backward through the graph a second time" not in str(e):
                    raise  # else the call itself went backward
    result.model = counter.result(result.graphs)
    return result


def _tensors(model: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    return tensors + [t for t in leaves if isinstance(t, torch.Tensor)]

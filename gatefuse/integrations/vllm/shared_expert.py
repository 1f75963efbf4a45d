"""Whether a shared expert ends with its gate: asked of what its forward does, not of its source.

The forward is traced by torch.fx, with its submodules as black boxes, with the gate and without it.
A gate can be hoisted if it is the last step of the first trace and the second one is all the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

__all__ = ["gate_names", "problem_of"]

_SIGMOIDS = {torch.sigmoid, torch.Tensor.sigmoid, torch.special.expit, "sigmoid"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}


def gate_names(module: nn.Module) -> Iterator[str]:
    """Names of the direct submodules whose weight has one row, as a gate's has."""
    for name, child in module.named_children():
        weight = child._parameters.get("weight")  # a property might do anything
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.shape[0] == 1:
            yield name


def problem_of(expert: nn.Module, name: str) -> str | None:
    """Why the submodule ``name`` is not a gate that can be set to None and applied to the result.

    The forward has to be ``sigmoid(gate(x)) * rest(x)`` with the gate, where a gate that returns
    ``(logit, bias)`` may be indexed, and ``rest(x)`` if the submodule is None.
    """
    kind, gate = type(expert).__name__, expert.get_submodule(name)
    try:
        gated = _output(expert)
        setattr(expert, name, None)
        rest = _output(expert)
    except Exception as e:  # whatever a forward raises on a proxy
        return f"{kind}.forward cannot be traced: {type(e).__name__}: {e}"
    finally:
        setattr(expert, name, gate)
    if gated.target in _PRODUCTS and len(gated.args) == 2 and not gated.kwargs:
        for factor, other in (gated.args, gated.args[::-1]):
            if _is_gate(factor, expert, name) and _same(other, rest):
                return None
    return f"{kind} does not end with the gate"


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _output(module: nn.Module) -> Any:
    """What the module returns, of its one input."""
    graph = _Tracer().trace(module)
    if len(graph.find_nodes(op="placeholder")) != 1:
        raise TypeError("it takes more than one input")
    return graph.output_node().args[0]


def _is_gate(factor: Any, expert: nn.Module, name: str) -> bool:
    if not isinstance(factor, fx.Node):
        return False
    if factor.op == "call_module":
        if not isinstance(expert.get_submodule(str(factor.target)), nn.Sigmoid):
            return False
    elif factor.target not in _SIGMOIDS:
        return False
    (logit,) = factor.args if len(factor.args) == 1 and not factor.kwargs else (None,)
    if isinstance(logit, fx.Node) and logit.target is operator.getitem and logit.args[1] == 0:
        logit = logit.args[0]
    return (
        isinstance(logit, fx.Node)
        and (logit.op, logit.target) == ("call_module", name)
        and [getattr(a, "op", None) for a in logit.args] == ["placeholder"]
        and not logit.kwargs
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two values of two traces are computed alike, of the same input."""
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        if isinstance(a, (tuple, list)) and type(a) is type(b):
            return len(a) == len(b) and all(map(_same, a, b))
        return type(a) is type(b) and a == b
    return (
        (a.op, a.target) == (b.op, b.target)
        and _same(a.args, b.args)
        and a.kwargs.keys() == b.kwargs.keys()
        and all(_same(a.kwargs[key], b.kwargs[key]) for key in a.kwargs)
    )

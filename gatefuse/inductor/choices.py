"""Shapes the kernels that Inductor generates around an inlined gate.

Inductor loops over rows wider than 1024 elements in blocks. An inlined gate makes that costly: the
norm in front of it, its dot product and the norm behind it are reductions that depend on each
other, so that the row is read once for each. Kept in registers (a persistent reduction) it is read
once. Kernels without a gate are left to Inductor's own choice.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch._inductor.virtualized import V

__all__ = ["GRADIENT_KEY", "install"]

log = logging.getLogger("gatefuse")

WIDEST = 8192
"""Widest row, in elements, that is kept in registers."""

GRADIENT_KEY = "gatefuse_gradient"
"""Key of ``node.meta`` that marks the gradient of a gate's input. Rows of its kernel stay in
registers too, if the gate's sum over a row is the only one. With the norms' sums in it, a loop over
the row is faster (H200, H = 4096, 1024 and 4096 rows: 2 to 5 %)."""


class _GateChoices:
    """Mixed into the class of the choices that are in force, whoever made them."""

    _plain: Any

    def should_use_persistent_reduction(self, features: Any, cooperative_reduction: bool) -> bool:
        """Inductor's hook: also where a row with a gate fits into registers."""
        # The answer of the choices before, which may have the method written over on the instance.
        return self._plain.should_use_persistent_reduction(features, cooperative_reduction) or (
            not cooperative_reduction and _keep_row(features)
        )


def install() -> None:
    """Let this thread's choices of Inductor's keep rows with a gate in registers; idempotent."""
    plain = V.choices
    if isinstance(plain, _GateChoices):
        return
    choices: Any = object.__new__(type("GateChoices", (_GateChoices, type(plain)), {}))
    choices.__dict__.update(vars(plain), _plain=plain)
    choices.__dict__.pop("should_use_persistent_reduction", None)
    V.set_choices_handler(choices)


def _keep_row(features: Any) -> bool:
    try:
        return _row_with_gate_fits(features)
    except Exception:  # internals of a version that looks different
        log.warning("gatefuse: kernels are left to Inductor's choice", exc_info=True)
        return False


def _row_with_gate_fits(features: Any) -> bool:
    from torch._inductor import config

    # A reduction order that the user asked for (PyTorch 2.15 and later) bounds the block.
    strict = getattr(features, "strict_reduction_rblock", lambda: None)()
    return (
        strict is None
        and config.triton.persistent_reductions
        and V.graph.sizevars.statically_known_leq(features.reduction_numel, WIDEST)
        and _has_gate(list(features.scheduler_nodes()))
        and _runs_along_rows(features)
    )


def _runs_along_rows(features: Any) -> bool:
    """Whether neighbouring elements of a row are neighbours in memory, for whatever is read or
    written once for each of them.

    Inductor's hint for the whole kernel says no as well where something is read once for each row
    with a stride, such as the weights of the routed experts.
    """
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.runtime.hints import ReductionHint

    rows, elements = features.numel, features.numel * features.reduction_numel
    for node in features.scheduler_nodes():
        if node.is_reduction():
            if features.reduction_hint(node) != ReductionHint.INNER:
                return False
        elif node.group[1][0] == elements:
            for access in (*node.read_writes.reads, *node.read_writes.writes):
                if isinstance(access, MemoryDep) and not (
                    access.is_contiguous()
                    or access.stride1_for_last_dim()
                    or V.graph.sizevars.statically_known_leq(math.prod(access.size), rows)
                ):
                    return False
    return True


def _has_gate(scheduler_nodes: list[Any]) -> bool:
    gates = (
        torch.ops.gatefuse.linear_sigmoid_mul.default,
        torch.ops.gatefuse.linear_sigmoid_mul_logit.default,
    )
    origins = [origin for n in scheduler_nodes for origin in n.node.get_origins()]
    if any(origin.target in gates for origin in origins):
        return True
    one_sum = sum(n.is_reduction() for n in scheduler_nodes) == 1
    return one_sum and any(GRADIENT_KEY in origin.meta for origin in origins)

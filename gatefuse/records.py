"""What is known of one gate, one graph, one model: plain data, which a report consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Activity",
    "DrawnNode",
    "GradientReport",
    "GraphReport",
    "Kind",
    "ModelGates",
    "RejectionReport",
    "SiteReport",
]

Kind = Literal["gate", "near miss", "other"]
"""Of a sigmoid that stayed as it was: a gate, for a reason of its own; one that lacks a part of a
gate; one that has nothing of a gate, such as SwiGLU's."""


@dataclass
class DrawnNode:
    """A node of a gate, for a drawing.

    operator: ``"aten.sigmoid"``; of an operand what it is: ``"input"``, ``"weight"``, ``"bias"``,
    ``"value"``, ``"addend"``, ``"constant"``. type: dtype and shape, ``"bf16[16, 1]"``. inputs: the
    names of the nodes that it reads, none for an operand.
    """

    name: str
    operator: str
    type: str
    inputs: list[str] = field(default_factory=list)


@dataclass
class SiteReport:
    """One fused gate. rows, H and D are sizes as text, for they may be symbolic.

    location, line: where the model's source computes the gate. layer: the module that does, by its
    name in the model.
    before, after: the nodes of the gate, each after those that it reads.
    """

    node: str
    location: str | None
    rows: str
    H: str
    D: str
    dtype: str
    has_bias: bool
    has_addend: bool
    keeps_logit: bool
    placement: str | None = None
    placement_reason: str = ""
    line: str | None = None
    layer: str | None = None
    key: str = field(default="", repr=False)
    before: list[DrawnNode] = field(default_factory=list, repr=False)
    after: list[DrawnNode] = field(default_factory=list, repr=False)


@dataclass
class RejectionReport:
    """A sigmoid that stayed as it was, and why."""

    node: str
    location: str | None
    reason: str
    kind: Kind = "other"
    line: str | None = None
    layer: str | None = None


@dataclass
class GradientReport:
    """What became of the gradients of one gate, in the graph of a backward.

    input, weight: in what form those two are computed, None where they are not. rewritten: in how
    many places the first is in another form than Inductor had it. reason: why it is not.
    """

    node: str
    location: str | None
    input: str | None
    weight: str | None
    rewritten: int = 0
    reason: str = ""
    line: str | None = None
    layer: str | None = None


@dataclass
class GraphReport:
    """One compiled graph.

    phase: ``"inference"``, ``"forward"``, ``"backward"``; ``"subgraph"`` for the body of a
    higher-order operator, such as a branch; ``"unknown"`` for a graph from a cache of which
    nothing else is known.
    before, after: readable code of the graph around the pass, where something was fused.
    code: the module that Inductor generated for a graph with a fused gate, where someone recorded.
    id: what Inductor's counters call the graph, in caches as well.
    """

    name: str
    phase: str
    from_cache: bool = False
    fused: int = 0
    sites: list[SiteReport] = field(default_factory=list)
    rejections: list[RejectionReport] = field(default_factory=list)
    gradients: list[GradientReport] = field(default_factory=list)
    before: str | None = None
    after: str | None = None
    code: str | None = None
    error: str | None = None
    id: str = ""


@dataclass
class ModelGates:
    """The gates that a model has, whatever was compiled.

    gates: the modules ``Linear(H, 1)``, or weights ``[1, H]``, of which the logit reaches a
    sigmoid, by name; a gate written in another way by its layer and line. fused: those of them
    that were fused. not_compiled: modules ``Linear(H, 1)`` that are in no compiled graph: whether
    they are gates cannot be seen.
    note: what was assumed, such as layers that are alike and were looked at once.
    """

    gates: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    not_compiled: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class Activity:
    """What PyTorch compiled while a report was open.

    graphs: those that Dynamo gave to a backend. cached: of Inductor's, those from a cache.
    before: graphs that this process had compiled before. elsewhere: compilations in other threads.
    hooked: whether gatefuse's pass was on Inductor's hook when something was compiled.
    breaks: torch's reasons for graph breaks, and how often. switched_off: what keeps PyTorch from
    compiling anything, if so. scanned: whether graphs were looked at without being compiled.
    """

    graphs: int = 0
    cached: int = 0
    before: int = 0
    elsewhere: int = 0
    hooked: bool = False
    breaks: dict[str, int] = field(default_factory=dict)
    switched_off: str | None = None
    scanned: bool = False

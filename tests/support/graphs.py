"""The FX graphs that Inductor compiles: how to get at them, and what is in them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tests.support.cuda_rewrites import emulate_coordinate_descent

Run = Callable[..., Any]


def op_nodes(graph: Graph | str | None) -> int:
    """How many gatefuse op calls a graph, or the readable text of one, holds."""
    assert graph is not None, "no graph text was recorded"
    if isinstance(graph, str):
        return len(re.findall(r"= torch\.ops\.gatefuse\.linear_sigmoid_mul\w*[.\w]*\(", graph))
    return sum("gatefuse" in str(node.target) for node in graph.nodes if node.op == "call_function")


def find(graph: Graph, target: Any) -> list[Node]:
    return graph.find_nodes(op="call_function", target=target)


class Capture(CustomGraphPass):
    """Keeps a copy of every post-grad graph that Inductor compiles, in `graphs`."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, graph: Graph) -> None:
        copied = Graph()
        values: dict[Node, Node] = {}
        output = copied.graph_copy(graph, values)
        for old, new in values.items():
            new.meta = dict(old.meta)
        copied.output(output)
        self.graphs.append(copied)

    def uuid(self) -> None:
        return None  # never cached


@contextlib.contextmanager
def capture_post_grad() -> Iterator[list[Graph]]:
    """The post-grad graphs of what is compiled inside, as the fusion pass gets them."""
    capture = Capture()
    with inductor_config.patch(post_grad_custom_post_pass=capture):
        yield capture.graphs


def post_grad_graph(
    fn: Run, inputs: tuple[Any, ...], *, dynamic: bool = False, coordinate_descent: bool = False
) -> Graph:
    """The inference graph that Inductor makes of `fn(*inputs)`; compiles and runs it."""
    torch._dynamo.reset()
    with (
        capture_post_grad() as graphs,
        emulate_coordinate_descent() if coordinate_descent else contextlib.nullcontext(),
        torch.no_grad(),
    ):
        torch.compile(fn, dynamic=dynamic)(*inputs)
    assert len(graphs) == 1, f"{len(graphs)} graphs"
    return graphs[0]


def traced(fn: Callable[..., Any], *inputs: Tensor) -> Graph:
    """A graph of ``fn`` on ``inputs``, and on as many more of the first one's shape as it takes."""
    missing = fn.__code__.co_argcount - len(inputs)
    more = [torch.randn_like(inputs[0]) for _ in range(missing)]
    return make_fx(fn, tracing_mode="fake")(*inputs, *more).graph


def copy_of(graph: Graph) -> Graph:
    copied, values = Graph(), {}
    copied.output(copied.graph_copy(graph, values))
    for old, new in values.items():
        new.meta = dict(old.meta)
    return copied

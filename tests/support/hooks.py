"""Inductor's hooks for passes, and a user's pass on them."""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from tests.support.graphs import op_nodes

HOOK = "post_grad_custom_post_pass"
PRE_HOOK = "post_grad_custom_pre_pass"


class Watcher(CustomGraphPass):
    """A user's pass: notes how many op nodes the graph has when it runs."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self.log = name, log

    def __call__(self, graph: Graph) -> None:
        self.log.append((self.name, op_nodes(graph)))

    def uuid(self) -> str:
        return f"watcher {self.name}"


def takes_lists() -> bool:
    return hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes")

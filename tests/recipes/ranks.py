"""What two processes of a gloo group run of docs/recipes.md, for `test_ranks`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import gatefuse
from tests.recipes import page
from tests.recipes.page import LAYERS, Model, loss_of

RANKS = 2


def step(name: str) -> dict[str, object]:
    """One training step of what a recipe makes of the model."""
    torch._dynamo.reset()
    with gatefuse.record() as report:
        model = page.run(name, model=Model(), gates=LAYERS)["model"]
        loss = loss_of(model)
        loss.backward()
    return {
        "fused": [g.fused for g in report.graphs if g.phase != "backward" and g.fused],
        "loss": loss.item(),
        "gradients": all(p.grad is not None for p in model.parameters()),
    }


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found = {"fsdp2": step("fsdp2"), "ddp": step("ddp")}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()

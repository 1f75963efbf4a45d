"""What two processes compile together, and check, for `test_distributed`; on the CPU or two GPUs.

Each case runs in both ranks, asserts its values there, and returns how its gates fared. `main`
writes what came of each to a file for each rank.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor import config
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gatefuse
from tests.routes.gates import SharedExpert, judge_all, make_expert, make_input
from tests.support.gradients import rewritten, rewritten_gradients

RANKS = 2
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
Model = Callable[..., Any]
Case = Callable[[DeviceMesh], gatefuse.Report]


def local(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def step(run: Model, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The result, and after a backward the gradients of the input and the parameters, whole."""
    x = x.detach().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    results = [local(out.detach())]
    for p in (x, *model.parameters()):
        assert p.grad is not None
        results.append(local(p.grad))
    return results


def compare(
    mesh: DeviceMesh,
    prepare: Callable[[nn.Module], tuple[Model, nn.Module]],
    compiled: Callable[[Model], Model] = torch.compile,
    model: Callable[[], nn.Module] = make_expert,
    *,
    same_input: bool = False,
) -> gatefuse.Report:
    """Train for a step eagerly, in float64, and compiled with gatefuse and a GPU's rewrite of the
    gate's gradients; compare."""
    device = mesh.device_type
    x = make_input(seed=0 if same_input else dist.get_rank()).to(device)
    run, wrapped = prepare(model().to(device))
    eager = step(run, wrapped, x)
    run, wrapped = prepare(model().double().to(device))
    reference = step(run, wrapped, x.double())
    run, wrapped = prepare(model().to(device))
    # On a GPU Inductor measures whether padding pays; with so few rows the answer is chance.
    unpadded = config.patch(shape_padding=False)
    with unpadded, gatefuse.fusing() as report, rewritten_gradients(device == "cpu"):
        fused = step(compiled(run), wrapped, x)
    judge_all(fused, eager, reference)
    return report


def tensor_parallel(mesh: DeviceMesh) -> gatefuse.Report:
    """The expert's linears are split over the ranks, the gate is not."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}

    def prepare(model: nn.Module) -> tuple[Model, nn.Module]:
        parallel = parallelize_module(model, mesh, plan)
        return parallel, parallel

    return compare(mesh, prepare, same_input=True)


def dtensors(mesh: DeviceMesh) -> gatefuse.Report:
    """All operands are DTensors: the rows are split over the ranks, the weights are on each."""

    def prepare(model: nn.Module) -> tuple[Model, nn.Module]:
        model = distribute_module(model, mesh)

        def run(x: Tensor) -> Any:
            return model(DTensor.from_local(x, mesh, [Shard(0)]))

        return run, model

    return compare(mesh, prepare)


def fsdp2(mesh: DeviceMesh) -> gatefuse.Report:
    """Parameters are split over the ranks and gathered before the compiled layer runs."""

    def prepare(model: nn.Module) -> tuple[Model, nn.Module]:
        sharded = fully_shard(model, mesh=mesh)
        return sharded, sharded

    return compare(mesh, prepare)


def ddp(mesh: DeviceMesh) -> gatefuse.Report:
    def prepare(model: nn.Module) -> tuple[Model, nn.Module]:
        parallel = DistributedDataParallel(model)
        return parallel, parallel

    return compare(mesh, prepare)


def wide_expert() -> nn.Module:
    torch.manual_seed(0)
    return SharedExpert(hidden=8192)  # a megabyte in each linear but the gate's


def ddp_split(mesh: DeviceMesh) -> gatefuse.Report:
    """Buckets so small that the graph is split between gate and product."""

    def prepare(model: nn.Module) -> tuple[Model, nn.Module]:
        parallel = DistributedDataParallel(model, bucket_cap_mb=1)
        return parallel, parallel

    return compare(mesh, prepare, model=wide_expert)


CASES: dict[str, Case] = {c.__name__: c for c in (tensor_parallel, dtensors, fsdp2, ddp, ddp_split)}


def main(rank: int, folder: Path, device: str, names: list[str]) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(BACKENDS[device], init_method=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh(device, (RANKS,))
    results = {}
    for name in names:
        torch._dynamo.reset()
        try:
            report = CASES[name](mesh)
            results[name] = {
                "fused": [g.fused for g in report.graphs if g.phase != "backward"],
                "reasons": [r.reason for r in report.rejections],
                "gradients": rewritten(report),
            }
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            break  # the other rank may wait for this one
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])

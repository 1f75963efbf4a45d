"""Dump the graphs around the fusion and check in the dump that it fired.

Run: python examples/dump_graphs.py [directory]
With depyf (pip install depyf) the whole compilation is dumped, gatefuse's graphs among the others.
Without it, gatefuse writes its own two graphs and a report. Exits non-zero if the graph before has
the op or the graph after has not.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import gatefuse

try:
    import depyf
except ImportError:
    depyf = None

OP = "torch.ops.gatefuse.linear_sigmoid_mul"


class Gate(nn.Module):
    """``sigmoid(linear(x)) * y``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * y


@torch.no_grad()
def main(directory: Path) -> int:
    """Compile once with dumping on and read the dump; returns the exit code."""
    gate = Gate(64)
    x, y = torch.randn(2, 4, 64).unbind()
    # A graph from Inductor's cache is not compiled, so that there would be nothing to dump.
    no_cache = {"fx_graph_cache": False}
    compiled = torch.compile(gate, options=gatefuse.options(no_cache))
    with torch._functorch.config.patch(enable_autograd_cache=False):
        if depyf is None:
            print("depyf is not installed (pip install depyf): dumping gatefuse's own graphs only")
            with gatefuse.record() as report:
                compiled(x, y)
            report.save(directory)
        else:
            with depyf.prepare_debug(str(directory)), gatefuse.record() as report:
                compiled(x, y)
    print(report)

    found = {}
    for stage in ("before", "after"):
        files = [p for p in sorted(directory.rglob("*.py")) if is_stage(p, stage)]
        found[stage] = sum(p.read_text().count(OP) for p in files)
        for path in files:
            print(f"{stage}: {path.relative_to(directory)}, {found[stage]} op nodes")
        if not files:
            print(f"{stage}: no file in {directory}")
            return 1
    return 0 if found == {"before": 0, "after": 1} and report.fused == 1 else 1


def is_stage(path: Path, stage: str) -> bool:
    """Whether a file of the dump is gatefuse's graph before or after the rewrite."""
    return f"gatefuse_{stage}" in path.name or path.name.endswith(f".{stage}.py")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(Path(temporary)))

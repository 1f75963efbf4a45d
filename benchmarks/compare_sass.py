"""Does a change to the kernel's source change its machine code? Needs no GPU.

``python -m benchmarks.compare_sass REV`` compiles the kernel of the working tree and that of git
revision REV for an H100 in six shapes and prints a table. Exits with 1 if any count differs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gatefuse import kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

_PDL = "addend_ptr PDL WEIGHT_FIRST"
SHAPES = {
    "even": (2048, 2048, 1024, 8, "addend_ptr"),
    "masked, all operands": (2560, 2560, 4096, 8, "bias_ptr addend_ptr logit_ptr"),
    "PDL": (3072, 3072, 1024, 8, _PDL),
    "PDL, trigger and evict first": (7168, 7168, 2048, 16, f"{_PDL} TRIGGER_FIRST EVICT_FIRST"),
    "unaligned, H != D, evict first": (2500, 100, 1024, 8, "EVICT_FIRST"),
    "looped": (20000, 20000, 8192, 16, "bias_ptr addend_ptr"),
}
"""Launches in bfloat16, logits in float32: H, D, block, warps; optional operands and flags."""


def machine_code(
    kernel: Any, H: int, D: int, block: int, warps: int, options: str
) -> tuple[list[str], dict[str, int]]:
    """The kernel's instructions for compute capability 9.0; how many they are, of these global
    loads and stores, the registers, and the bytes that a thread spills."""
    present = options.split()
    constants: dict[str, Any] = {
        **{name: None for name in ("bias_ptr", "addend_ptr", "logit_ptr") if name not in present},
        **dict(H=H, D=D, UNROLL=max(H, D) <= kernels.UNROLL_LIMIT),
        **dict(BLOCK_H=block, BLOCK_D=min(block, triton.next_power_of_2(D))),
        **{flag: flag in present for flag in kernel.arg_names if flag.endswith(("PDL", "FIRST"))},
    }
    signature, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            continue
        pointer = name.endswith("_ptr")
        element = "fp32" if name == "logit_ptr" else "bf16"
        signature[name] = f"*{element}" if pointer else "i32"
        if pointer or H % 16 == D % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    launch = {"num_warps": warps, **({"launch_pdl": True} if "PDL" in present else {})}
    source = ASTSource(kernel, signature, constants, attributes)
    cubin = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE)
    code = [line for line in code if line != "NOP"]  # padding
    names = Counter(opcode(line)[:3] for line in code)
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    counts = {"instructions": len(code), "loads": names["LDG"], "stores": names["STG"]}
    counts |= {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}
    return code, counts


def opcode(instruction: str) -> str:
    """With its modifiers, without predicate and operands."""
    return re.sub(r"^@\S+ ", "", instruction).split()[0]


def source_at(revision: str) -> str:
    show = ["git", "-C", str(Path(__file__).parent), "show", f"{revision}:gatefuse/kernels.py"]
    return subprocess.run(show, capture_output=True, text=True, check=True).stdout


def kernel_of(source: str, folder: str) -> Any:
    """The kernel that a source defines; it is kept in a file, where Triton reads it from."""
    path = Path(folder, "kernels_before.py")
    path.write_text(source)
    module = sys.modules[path.stem] = ModuleType(path.stem)
    exec(compile(source, path, "exec"), module.__dict__)
    return module.linear_sigmoid_mul_kernel


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_sass", description=__doc__)
    parser.add_argument("revision", help="the git revision to compare with")
    revision = parser.parse_args(arguments).revision
    print(f"Kernel at {revision} -> working tree; Triton {triton.__version__}, sm_90, bfloat16\n")
    print("| shape | instructions | loads | stores | registers | spills | code |\n|" + "---|" * 7)
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        before = kernel_of(source_at(revision), folder)
        for name, shape in SHAPES.items():
            old, was = machine_code(before, *shape)
            new, now = machine_code(kernels.linear_sigmoid_mul_kernel, *shape)
            differ |= was != now
            counts = zip(was.values(), now.values())
            cells = [f"{b}" if a == b else f"{a} -> {b}" for a, b in counts]
            same = list(map(opcode, old)) == list(map(opcode, new))
            code = "identical" if old == new else "same opcodes" if same else "differs"
            print(f"| {name} |", " | ".join([*cells, code]), "|")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())

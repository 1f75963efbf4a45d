"""Devices that the tests do not run on: the kernel in every launch shape, and Inductor's code for
ROCm, are compiled and read. Needs no GPU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends import backends
from triton.backends.compiler import GPUTarget

from gatefuse import backward_kernel, kernels
from gatefuse.kernels import LaunchConfig, launch_config
from tests.support.cuda_codegen import (
    MI300X,
    MI355X,
    Device,
    Driver,
    local_memory,
    spilled,
)
from tests.support.form_table import Form
from tests.test_cuda_codegen import (
    INFERENCE,
    between_products,
    block_end,
    block_end_shapes,
    check_form,
    generate,
    glue,
    glue_shapes,
    glue_without_gate,
    island,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

#: A width for each block: full and, for blocks of more than 1024, partial; at the end the widest
#: that are unrolled and two that are looped over.
WIDTHS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2000, 2048, 4000, 4096, 8000, 8192]
WIDTHS += [14336, 16000, 16384, 20000, 20480]
ROWS = [None, 1, 64, 256, 257, 1024, 8192, 65536]


def target_or_skip(name: str) -> GPUTarget:
    target = TARGETS[name]
    if not any(backend.compiler.supports_target(target) for backend in backends.values()):
        pytest.skip(f"the installed Triton has no backend for {name}")
    return target


class Launch(NamedTuple):
    H: int
    D: int
    dtype: torch.dtype
    config: LaunchConfig
    pdl: bool = False


def supports_pdl(target: GPUTarget) -> bool:
    """What the product asks of a device before it launches the kernel so."""
    hip = "7.0" if target.backend == "hip" else None
    capability = (9, 4) if hip else divmod(target.arch, 10)
    with (
        mock.patch.object(torch.version, "hip", hip),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
    ):
        return kernels.supports_pdl.__wrapped__(0)


def every_launch(target: GPUTarget) -> list[Launch]:
    """Each shape in which the launch rule starts the kernel, once, with all operands and H = D.
    Of rows that are launched alike, wide ones need most registers and narrow ones, in bfloat16,
    have the smallest loads."""
    chosen: dict[Any, tuple[float, Launch]] = {}
    for width, rows, dtype, pdl in itertools.product(
        WIDTHS, ROWS, (torch.bfloat16, torch.float32), {False, supports_pdl(target)}
    ):
        size = dtype.itemsize
        config = launch_config(rows, width, width, size, addend=True, dependent=pdl)
        if not pdl:  # no trigger, so the same code
            config = config._replace(trigger_first=False)
        key = config, pdl, width <= kernels.UNROLL_LIMIT
        weight = width * size if width > 1024 else width / size
        if key not in chosen or weight > chosen[key][0]:
            chosen[key] = weight, Launch(width, width, dtype, config, pdl)
    return [launch for _, launch in chosen.values()]


class Compiler:
    """Stands in for a kernel: what is launched is compiled, with the arguments' alignment."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


def compiler_of(module: Any, name: str) -> Any:
    """A patch: the module's kernel is compiled and not launched."""
    return mock.patch.object(module, name, Compiler(getattr(module, name)))


def on(target: GPUTarget) -> Any:
    """A patch: Triton compiles for the target."""
    number = 1000 + list(TARGETS.values()).index(target)
    return mock.patch.object(triton.runtime.driver, "_active", Driver(target, number))


def compile_launch(target: GPUTarget, launch: Launch) -> Any:
    """What `kernels.launch` would compile on a GPU, with every operand."""
    rows = 3

    def make(*shape: int, dtype: torch.dtype = launch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias = make(rows, launch.H), make(1, launch.H), make(1)
    value, addend, out = (make(rows, launch.D) for _ in range(3))
    logit = make(rows, dtype=torch.float32)
    with on(target), compiler_of(kernels, "linear_sigmoid_mul_kernel") as compiler:
        kernels.launch(
            *(x, weight, value, bias, addend, out, logit),
            pdl=launch.pdl,
            weight_first=launch.pdl,
            config=launch.config,
        )
    return compiler.compiled


_AMD_BYTES = {"ubyte": 1, "ushort": 2, "short_d16": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}


def global_loads(asm: Any) -> list[int]:
    """Bytes of each."""
    if "ptx" in asm:
        loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bu](\d+)\b", asm["ptx"])
        return [int(n or 1) * int(bits) // 8 for n, bits in loads]
    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_(\w+)", asm["amdgcn"], re.MULTILINE)
    return [_AMD_BYTES[load] for load in loads]


def check(target: GPUTarget, launch: Launch, folder: Path) -> None:
    compiled = compile_launch(target, launch)
    binary = compiled.asm["hsaco" if target.backend == "hip" else "cubin"]
    assert binary.startswith(b"\x7fELF")
    assert spilled(compiled.asm, folder) == 0

    config, size = launch.config, launch.dtype.itemsize
    threads = config.num_warps * target.warp_size
    assert threads <= 1024
    if target.backend == "cuda":
        order = re.findall(r"griddepcontrol\.(\w+)", compiled.asm["ptx"])
        assert order == ["wait", "launch_dependents"] * launch.pdl
    widest = min(16, max(1, min(config.block_h, config.block_d) // threads) * size)
    loads = global_loads(compiled.asm)
    if launch.H % 16 == launch.D % 16 == 0:
        narrow = [n for n in loads if n < widest]
        assert len(narrow) <= 1, f"{narrow} bytes a load instead of {widest}; the bias is one"
    if max(launch.H, launch.D) <= kernels.UNROLL_LIMIT and config.block_h % threads == 0:
        # Each element is loaded once. (Narrower rows may be loaded by scalar instructions.)
        h, d = (
            -(-width // block) * max(1, block // threads)
            for width, block in ((launch.H, config.block_h), (launch.D, config.block_d))
        )
        assert sum(loads) in (2 * (h + d) * size, (2 * (h + d) + 1) * size)


@pytest.mark.parametrize("name", TARGETS)
def test_every_launch_shape(name: str, tmp_path: Path) -> None:
    target = target_or_skip(name)
    launches = every_launch(target)
    assert any(launch.pdl for launch in launches) == (name in ("sm_90", "sm_100"))
    for launch in launches:
        try:
            check(target, launch, tmp_path)
        except Exception as error:
            error.add_note(f"{name}: {launch}")
            raise


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("h", "d"), [(2048, 512), (512, 2048), (2500, 100), (20000, 70)])
def test_other_widths(name: str, h: int, d: int, tmp_path: Path) -> None:
    """Rows of input and value that are not equally wide, and none that is a multiple of 16."""
    target = target_or_skip(name)
    pdl = supports_pdl(target)
    for dtype in (torch.bfloat16, torch.float32):
        config = launch_config(64, h, d, dtype.itemsize, addend=True, dependent=pdl)
        check(target, Launch(h, d, dtype, config, pdl), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("h", "d"), [(64, 64), (2048, 2048), (2500, 100), (4096, 4096), (8192, 8192)]
)
def test_the_backward(name: str, h: int, d: int, tmp_path: Path) -> None:
    """Both kernels, with all operands; rows and the sums over them fit into registers."""
    target = target_or_skip(name)
    for dtype in (torch.bfloat16, torch.float32):
        grad, v, grad_v = (torch.empty(3, d, dtype=dtype, device="meta") for _ in range(3))
        x, grad_x = (torch.empty(3, h, dtype=dtype, device="meta") for _ in range(2))
        w, grad_w = (torch.empty(1, h, dtype=dtype, device="meta") for _ in range(2))
        b, grad_b = (torch.empty(1, dtype=dtype, device="meta") for _ in range(2))
        with (
            on(target),
            compiler_of(backward_kernel, "linear_sigmoid_mul_backward_kernel") as rows,
            compiler_of(backward_kernel, "add_parts_kernel") as parts,
        ):
            backward_kernel.launch(
                *(grad, v, x, w, b, grad_v, grad_x, grad_w, grad_b), multiprocessors=132
            )
        # Triton 3.6 keeps eight bytes of a thread in memory for an A100.
        most = 8 if (name, triton.__version__[:4]) == ("sm_80", "3.6.") else 0
        for kernel in (rows, parts):
            assert spilled(kernel.compiled.asm, tmp_path) <= most


# --- Inductor's code for ROCm -----------------------------------------------------------------

_rocm = pytest.mark.parametrize("device", [MI300X, MI355X], ids=["gfx942", "gfx950"])
_rows = pytest.mark.parametrize("rows", [False, True], ids=["static", "dynamic-rows"])


def one_of_each_kind() -> list[Form]:
    """Forms that differ in what they fuse and keep; what else they differ in is the matcher's, and
    the same as on CUDA."""
    kinds: dict[Any, Form] = {}
    for f in INFERENCE:
        kind = f.fused, f.addend, f.bias, f.keeps_logit, f.dynamic, f.gpu_placement
        kinds.setdefault(kind, f)
    return list(kinds.values())


@pytest.mark.parametrize("form", one_of_each_kind(), ids=lambda form: form.id)
def test_forms_on_rocm(form: Form) -> None:
    check_form(form, device=MI300X)


@_rocm
@_rows
@pytest.mark.parametrize("h", [2048, 8192])
def test_glue_on_rocm_is_one_kernel(h: int, rows: bool, device: Device, tmp_path: Path) -> None:
    """Which computes each row in registers and spills none of them, as on CUDA."""
    target_or_skip(str(device.arch))
    code, report = generate(glue, glue_shapes(h), rows=rows, device=device)
    without, _ = generate(glue_without_gate, glue_shapes(h)[:-1], rows=rows, device=device)
    assert [site.placement for site in report.sites] == ["inline"]
    assert len(code.launches) <= len(without.launches)
    assert code.launches.count("extern_kernels.mm") == 1  # the router's
    (kernel,) = code.kernels
    assert kernel.startswith("triton_per_")
    assert "DeviceProperties(type='hip'" in code.source
    assert local_memory(code, kernel, tmp_path, device) == 0


@_rocm
@_rows
def test_experts_sum_on_rocm_joins_the_gate(rows: bool, device: Device, tmp_path: Path) -> None:
    target_or_skip(str(device.arch))
    code, _ = generate(block_end, block_end_shapes(4096, 6), rows=rows, device=device)
    (kernel,) = code.launches
    assert kernel.startswith("triton_per_")
    assert local_memory(code, kernel, tmp_path, device) == 0


@_rocm
@_rows
def test_island_on_rocm_is_one_launch(rows: bool, device: Device, tmp_path: Path) -> None:
    target_or_skip(str(device.arch))
    shapes = [(64, 2048), (1, 2048), (64, 2048), (64, 2048)]
    code, report = generate(island, shapes, rows=rows, device=device)
    assert [site.placement for site in report.sites] == ["kernel"]
    (kernel,) = code.launches
    assert code.user_kernels == [kernel]
    assert code.divisible_by_16(kernel) >= {
        *("input_ptr", "weight_ptr", "value_ptr", "addend_ptr", "out_ptr"),
        *("input_stride", "value_stride", "addend_stride", "out_stride"),
    }
    assert local_memory(code, kernel, tmp_path, device) == 0


@_rocm
def test_matrix_products_on_rocm_are_no_neighbours(device: Device) -> None:
    shapes = [(64, 2048), (1, 2048), (512, 2048), (2048, 512)]
    code, report = generate(between_products, shapes, device=device)
    assert code.launches.count("extern_kernels.mm") == 2
    assert len(code.launches) == 3
    assert [site.placement for site in report.sites] == ["kernel"]

"""Inductor's code for CUDA and ROCm, generated on a machine without a GPU.

Inside :func:`cuda_codegen` tensors on ``cuda`` are fake, PyTorch and Triton believe in one H200 (or
another :class:`Device`), and Inductor compiles as for it up to the source of the generated module,
which is kept and not run: calling a compiled function returns fake tensors of the right sizes. What
needs the device (autotuning, results, times) is in test_gpu.py.

For ROCm a build of PyTorch for it is imitated by ``torch.version.hip``. What PyTorch derives from
that when it is imported (layouts of convolutions, the largest block of a pointwise kernel) stays.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import subprocess
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph
import torch.utils._triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class Device:
    """A GPU that PyTorch and Triton believe in; arch: compute capability, or AMD's name."""

    name: str
    arch: int | str
    multiprocessors: int
    warp_size: int
    capability: tuple[int, int]

    @property
    def hip(self) -> bool:
        return isinstance(self.arch, str)

    @property
    def target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("hip" if self.hip else "cuda", self.arch, self.warp_size)

    @property
    def limits(self) -> dict[str, int]:
        """What Inductor's heuristics look at."""
        return {
            "multi_processor_count": self.multiprocessors,
            "major": self.capability[0],
            "regs_per_multiprocessor": 65536 * self.warp_size // 32,
            "max_threads_per_multi_processor": 2048,
            "max_threads_per_block": 1024,
            "warp_size": self.warp_size,
        }


H200 = Device("NVIDIA H200", 90, 132, 32, (9, 0))
MI300X = Device("AMD Instinct MI300X", "gfx942", 304, 64, (9, 4))
MI355X = Device("AMD Instinct MI355X", "gfx950", 256, 64, (9, 5))


@dataclass
class Code:
    """The source of one generated module."""

    source: str

    @property
    def kernels(self) -> list[str]:
        """Names of the Triton kernels that Inductor generated, in order; ``triton_per_...`` keeps a
        row in registers and ``triton_red_...`` loops over it."""
        return re.findall(r"^(triton_\w+) = async_compile\.triton\(", self.source, re.MULTILINE)

    @property
    def user_kernels(self) -> list[str]:
        """Names of the kernels that were not generated but only launched."""
        launched = re.findall(r"^(\w+) = async_compile\.triton\(", self.source, re.MULTILINE)
        return [name for name in launched if name not in self.kernels]

    @property
    def launches(self) -> list[str]:
        """What the module calls, in order: Triton kernels, library products, operators."""
        call = self.source[self.source.index("def call(") :]
        found = re.findall(
            r"^ +(?:\w+ = )?(?:(\w+)\.run\(|(extern_kernels\.\w+)\(|(torch\.ops\.[\w.]+)\()",
            call,
            re.MULTILINE,
        )
        return ["".join(names) for names in found]

    def kernel_source(self, name: str) -> str:
        """The module that holds one Triton kernel."""
        begin = re.search(
            rf"^{name} = async_compile\.triton\('\w+', '''", self.source, re.MULTILINE
        )
        assert begin is not None, f"no kernel {name}"
        return self.source[begin.end() : self.source.index("''', device_str=", begin.end())]

    def divisible_by_16(self, name: str) -> set[str]:
        """The arguments of a kernel that Triton is told to take for multiples of 16."""
        meta = re.search(r"^ +triton_meta=(\{.*\}),$", self.kernel_source(name), re.MULTILINE)
        assert meta is not None, f"no triton_meta in {name}"
        triton_meta = eval(meta.group(1), {"DeviceProperties": DeviceProperties})
        arguments = list(triton_meta["signature"])
        hints = triton_meta["configs"][0].items()
        return {arguments[i] for (i,), hint in hints if ["tt.divisibility", 16] in hint}


@dataclass
class Generated:
    """The modules that were generated, in order."""

    codes: list[Code] = field(default_factory=list)

    @property
    def code(self) -> Code:
        """The only one."""
        (code,) = self.codes
        return code


class Driver:
    """What is asked of Triton's driver before a kernel is compiled. A ``triton.jit`` function keeps
    what it has compiled by the number of the device."""

    def __init__(self, target: Any, number: int = 0) -> None:
        self.target = target
        self.number = number

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


def _forget_triton() -> None:
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _hint(size: Any) -> int:
    sizevars = V.graph.sizevars
    known = getattr(sizevars, "optimization_hint", None) or sizevars.size_hint
    return size if isinstance(size, int) else int(known(size))


@contextlib.contextmanager
def cuda_codegen(device: Device = H200) -> Iterator[Generated]:
    """Generate code for the device; tensors made inside on ``cuda`` are fake."""
    import triton

    generated = Generated()

    def compile_to_module(self: GraphLowering) -> Any:
        source = self.codegen()[0]
        source = getattr(source, "value", source)
        generated.codes.append(Code(source))
        outputs = [
            (
                [_hint(n) for n in output.get_size()],
                [_hint(n) for n in output.get_stride()],
                output.get_dtype(),
                output.get_device(),
            )
            if hasattr(output, "get_stride")
            else 1
            for output in self.graph_outputs
        ]

        def call(args: list[Any]) -> tuple[Any, ...]:
            args.clear()
            return tuple(
                output
                if isinstance(output, int)
                else torch.empty_strided(*output[:2], dtype=output[2], device=output[3])
                for output in outputs
            )

        module = types.ModuleType("generated")
        self.cache_key, self.cache_path = PyCodeCache.write(source)
        self.cache_linemap = []
        module.__dict__.update(call=call, runner=None, __file__=self.cache_path)
        return module

    properties = types.SimpleNamespace(
        **device.limits,
        name=device.name,
        # Asked for where PyTorch is built without CUDA, too.
        gcnArchName=f"{device.arch}:sramecc+:xnack-" if device.hip else "",
        minor=device.capability[1],
        total_memory=141 << 30,
        L2_cache_size=50 << 20,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10,
    )
    hints = DeviceProperties(device.target.backend, index=0, cc=device.arch, **device.limits)
    state = torch.zeros(16, dtype=torch.uint8)
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: device.capability,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_: state,
        "set_rng_state": lambda *_: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
    }
    with contextlib.ExitStack() as stack:

        def patch(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        for name, value in cuda.items():
            patch(torch.cuda, name, value)
        patch(CudaInterface, "is_available", staticmethod(lambda: True))
        patch(CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda *_: None))
        patch(torch.accelerator, "is_available", lambda: False)
        patch(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext())
        patch(DeviceProperties, "create", classmethod(lambda *_: hints))
        if hasattr(torch._subclasses.fake_tensor, "init_gpu_context"):
            patch(torch._subclasses.fake_tensor, "init_gpu_context", lambda *_: None)
        # It traces attention patterns with real tensors on the device.
        patch(torch._inductor.fx_passes.joint_graph, "lazy_init", lambda *_: None)
        patch(GraphLowering, "compile_to_module", compile_to_module)
        # What PyTorch has found out about Triton holds for the real device, and later for this one.
        _forget_triton()
        stack.callback(_forget_triton)
        # shape_padding would time products on the device.
        stack.enter_context(inductor_config.patch(force_disable_caches=True, shape_padding=False))
        patch(triton.runtime.driver, "_active", Driver(device.target))
        patch(torch.version, "hip", "7.0.0" if device.hip else None)
        stack.enter_context(FakeTensorMode())
        yield generated


def on_cuda(t: torch.Tensor) -> torch.Tensor:
    """A fake tensor on the GPU like `t`: sizes, strides, and which sizes are marked dynamic."""
    moved = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
    # What a fake tensor knows of itself, its device too, is not copied.
    moved.__dict__.update({k: v for k, v in t.__dict__.items() if k not in moved.__dict__})
    return moved


def spilled(asm: Any, folder: Path) -> int:
    """Bytes of memory that a thread of a compiled kernel uses for want of registers."""
    import triton

    if "amdgcn" in asm:
        names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        found = [re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"]) for name in names]
    else:
        cubin = folder / "cubin"
        cubin.write_bytes(asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True
        )
        found = [re.search(rf"\b{name}:(\d+)", usage.stdout) for name in ("STACK", "LOCAL")]
    numbers = [int(match[1]) for match in found if match is not None]
    assert len(numbers) == len(found)
    return sum(numbers)


def local_memory(code: Code, kernel: str, folder: Path, device: Device = H200) -> int:
    """Compile a generated kernel for the device, in each of Inductor's configurations; the fewest
    bytes of memory that a thread uses for want of registers."""
    import triton
    from torch._inductor.runtime import triton_heuristics

    path = folder / "kernel.py"
    path.write_text(code.kernel_source(kernel).replace("triton_helpers.set_driver_to_gpu()", ""))
    with (
        mock.patch.object(triton.runtime.driver, "_active", Driver(device.target)),
        mock.patch.object(torch.version, "hip", "7.0.0" if device.hip else None),
        mock.patch.object(triton_heuristics.triton_helpers, "set_driver_to_gpu"),
        mock.patch.object(
            triton_heuristics.StaticTritonCompileResult,
            "can_statically_launch",
            staticmethod(lambda *_: None),
        ),
    ):
        names = runpy.run_path(str(path))
        (tuner,) = (v for v in names.values() if isinstance(v, triton_heuristics.CachingAutotuner))
        return min(
            spilled(tuner._precompile_config(config).kernel.asm, folder) for config in tuner.configs
        )

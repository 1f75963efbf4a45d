"""`gatefuse doctor`: what keeps gates from being fused on this machine and in this process.

Each check says ok, warning (it works, but slower, in part, or untested) or problem (gates are not
fused, or a setting does nothing), and what to do. In a program, ``print(doctor.diagnose())`` sees
that program's hooks and settings.
"""

from __future__ import annotations

import getpass
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gatefuse import settings
from gatefuse.compat import TESTED_VLLM
from gatefuse.environment import environment

__all__ = ["Check", "Diagnosis", "diagnose"]

Status = Literal["ok", "warning", "problem"]

# The support matrix in docs/usage.md.
TESTED_TRITON = {"2.11": "3.6", "2.13": "3.7", "2.15": "3.9"}
"""Minor versions of PyTorch on which the test suite is run, each with its Triton."""
TESTED_PYTHON = ("3.11", "3.12", "3.13")
TESTED_GPUS = {"2.11": ("H100", "H200")}
"""GPUs on which the tests have run, with which PyTorch."""

VLLM_TIMEOUT = 90.0  # seconds; vLLM takes 10 to 30 to import
_INSTALL = "install gatefuse into this environment: pip install gatefuse, or pip install . there"


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    subject: str
    status: Status
    text: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n{'':10}-> {self.advice}" if self.advice else ""
        return f"{self.status:8}  {self.subject}: {self.text}{advice}"


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and the versions and devices that a report of a bug needs."""

    environment: dict[str, Any]
    checks: list[Check]

    @property
    def problems(self) -> list[Check]:
        """What has to be put right before gates are fused, or a setting is followed."""
        return [check for check in self.checks if check.status == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the environment, and the checks."""
        return self.environment | {"checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        warnings = sum(check.status == "warning" for check in self.checks)
        problems = len(self.problems)
        verdict = "gatefuse can fuse gates here" if not problems else _count(problems, "problem")
        verdict += f"; {_count(warnings, 'warning')}" if warnings else ""
        return "\n".join([*map(str, self.checks), f"{verdict}."])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def diagnose() -> Diagnosis:
    """Look at everything. Where vLLM is installed this takes as long as its import, in a process
    of its own; raises nothing: a check that fails is a problem."""
    broken = _inductor_error()
    found = environment()
    checks: list[Check] = []
    for check in _CHECKS:
        if broken and check in _NEED_INDUCTOR:
            continue
        try:
            checks += check(found)
        except Exception as e:  # on a PyTorch that looks different, say
            subject = check.__name__.strip("_").replace("_", " ")
            checks.append(Check(subject, "problem", f"cannot be checked: {type(e).__name__}: {e}"))
    if broken:
        checks.append(Check("Inductor", "problem", f"cannot be imported: {broken}"))
    return Diagnosis(found, checks)


def _inductor_error() -> str | None:
    """Why Inductor cannot be imported, as where it cannot make its cache's folder."""
    try:
        importlib.import_module("torch._inductor.config")
        importlib.import_module("torch._dynamo.config")
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


def _minor(found: dict[str, Any]) -> str:
    return ".".join(found["torch"].split(".")[:2])


def _versions(found: dict[str, Any]) -> Iterator[Check]:
    python = found["python"]
    if python.rpartition(".")[0] in TESTED_PYTHON:
        yield Check("Python", "ok", python)
    else:
        tested = ", ".join(TESTED_PYTHON)
        yield Check("Python", "warning", f"{python} is not tested; {tested} are")
    yield Check("gatefuse", "ok", found["gatefuse"])
    torch = found["torch"]
    if (reason := found["unsupported"]) is not None:
        yield Check("PyTorch", "problem", f"nothing is fused: {reason}")
    elif _minor(found) in TESTED_TRITON:
        yield Check("PyTorch", "ok", torch)
    else:
        tested = ", ".join(TESTED_TRITON)
        yield Check(
            "PyTorch", "warning", f"{torch} is not tested; gates are fused. Tested: {tested}"
        )
    for package in ("transformers", "depyf"):
        yield Check(package, "ok", found[package] or "not installed; not needed")


def _triton(found: dict[str, Any]) -> Iterator[Check]:
    triton, wanted = found["triton"], TESTED_TRITON.get(_minor(found))
    if triton is None:
        if found["devices"] == ["cpu"]:
            yield Check("Triton", "ok", "cannot be imported; only a GPU needs it")
        else:
            yield Check(
                "Triton",
                "problem",
                "cannot be imported; nothing compiles for a GPU without it",
                "reinstall PyTorch, which brings its Triton; `python -c 'import triton'` says more",
            )
    elif wanted is None or f"{triton}.".startswith(f"{wanted}."):
        yield Check("Triton", "ok", triton)
    else:
        text = f"{triton} with PyTorch {found['torch']}, which is tested with {wanted}"
        yield Check("Triton", "warning", text, "use the Triton that this PyTorch brings")


def _devices(found: dict[str, Any]) -> Iterator[Check]:
    import torch

    if found["devices"] == ["cpu"]:
        build = torch.version.cuda or torch.version.hip or torch.version.xpu
        gpu = f"; PyTorch is built for GPUs ({build}) and finds none" if build else ""
        yield Check("devices", "ok", f"cpu{gpu}")
    for device in found["devices"]:
        if device != "cpu":
            tested = any(name in device for name in TESTED_GPUS.get(_minor(found), ()))
            text = f"{device}: the tests have not run on it with PyTorch {found['torch']}"
            advice = "`gatefuse bench` checks results and times here"
            yield (
                Check("devices", "ok", device)
                if tested
                else Check("devices", "warning", text, advice)
            )


def _cpp_compiler(found: dict[str, Any]) -> Iterator[Check]:
    on_gpu = found["devices"] != ["cpu"]
    status: Status = "warning" if on_gpu else "problem"
    need = "models on the CPU do not compile" if on_gpu else "nothing compiles"
    if (compiler := found["c++ compiler"]) is not None:
        yield Check("C++ compiler", "ok", compiler)
    else:
        name = os.environ.get("CXX")
        text = f"CXX={name} does not run" if name else "Inductor finds none"
        advice = "install one (Debian, Ubuntu: apt install g++), or name it in CXX"
        yield Check("C++ compiler", status, f"{text}: {need}", advice)
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        advice = "install Python's headers (Debian, Ubuntu: apt install python3-dev)"
        yield Check("Python.h", status, f"is not there: {need}", advice)


def _compile_switches(found: dict[str, Any]) -> Iterator[Check]:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    nothing = "nothing is compiled, and so nothing is fused"
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        yield Check("TORCHDYNAMO_DISABLE=1", "problem", nothing, "unset it")
    if dynamo.disable:
        advice = "unset it, or do not set torch._dynamo.config.disable"
        yield Check("TORCH_COMPILE_DISABLE=1", "problem", nothing, advice)
    mode = os.environ.get("TORCHINDUCTOR_FX_COMPILE_MODE", "")
    if mode.upper().endswith("SUBPROCESS"):
        text = "Inductor runs no custom passes in this mode, and so nothing is fused"
        yield Check(f"TORCHINDUCTOR_FX_COMPILE_MODE={mode}", "problem", text, "unset it")
    if inductor.freezing:
        text = "on the CPU, Inductor packs linears before gatefuse sees them: gates are left alone"
        advice = "on the CPU, compile without torch._inductor.config.freezing"
        yield Check("freezing", "warning", text, advice)


def _hooks(found: dict[str, Any]) -> Iterator[Check]:
    import torch._inductor.config as config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    from gatefuse.inductor import hooks
    from gatefuse.inductor.fusion_pass import GateFusionPass

    here = False
    for hook in (hooks.PRE_HOOK, hooks.POST_HOOK):
        for one in hooks.passes_of(getattr(config, hook)):
            if isinstance(one, GateFusionPass):
                here = True
                yield Check(hook, "ok", f"gatefuse, with {one.options}")
                continue
            of = one if hasattr(one, "__qualname__") else type(one)
            name = f"{of.__module__}.{of.__qualname__}"
            if isinstance(one, CustomGraphPass) and one.uuid() is not None:
                yield Check(hook, "ok", f"{name}, which gatefuse runs after")
            else:
                text = f"{name} has no uuid(): Inductor caches no graph while it is there"
                advice = "make it a torch._inductor.custom_graph_pass.CustomGraphPass"
                yield Check(hook, "warning", text, advice)
    if not here:
        text = "gatefuse is on none; the backend, gatefuse.options() and enable() put it there"
        yield Check("Inductor's hooks", "ok", text)


def _cache_folder(found: dict[str, Any]) -> Iterator[Check]:
    # Before Inductor, which cannot even be imported without its folder.
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # an id without a name, as in containers
        user = f"uid_{os.getuid()}"
    default = os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default
    if (reason := _not_writable(folder)) is None:
        yield Check("Inductor's cache", "ok", folder)
    else:
        text = f"{folder} cannot be written ({reason}): nothing compiles"
        advice = "make it writable, or name another folder in TORCHINDUCTOR_CACHE_DIR"
        yield Check("Inductor's cache", "problem", text, advice)


def _caches(found: dict[str, Any]) -> Iterator[Check]:
    import torch._inductor.config as config

    if config.force_disable_caches or not config.fx_graph_cache:
        text = "off: every process compiles its graphs anew"
    else:
        text = "on; a graph from the cache is reported with its number of gates, without detail"
    yield Check("Inductor's cache of graphs", "ok", text)


def _not_writable(folder: str) -> str | None:
    """Why no file can be written to a folder that is there or can be made; None if it can."""
    try:
        place = Path(folder).absolute()
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as e:
        return e.strerror or str(e)


def _backend(found: dict[str, Any]) -> Iterator[Check]:
    subject = 'backend="gatefuse"'
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="gatefuse")
    if not entries:
        text = "torch.compile does not find it; gatefuse.options() and enable() work all the same"
        yield Check(subject, "problem", text, _INSTALL)
    for entry in entries:
        entry.load()
        installed = None if entry.dist is None else entry.dist.version
        if installed in (None, found["gatefuse"]):
            yield Check(subject, "ok", "torch.compile finds it")
        else:
            text = f"installed is gatefuse {installed}, imported is {found['gatefuse']}"
            yield Check(subject, "warning", text, _INSTALL)


def _vllm(found: dict[str, Any]) -> Iterator[Check]:
    if (version := found["vllm"]) is None:
        yield Check("vLLM", "ok", "not installed; not needed")
        return
    if version.split("+")[0] in TESTED_VLLM:
        yield Check("vLLM", "ok", version)
    else:
        text = f"{version} is not tested; {' and '.join(TESTED_VLLM)} are"
        yield Check("vLLM", "warning", text)
    plugins = os.environ.get("VLLM_PLUGINS")
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="gatefuse"):
        yield Check("vLLM's plugin", "problem", "vLLM does not find it", _INSTALL)
    elif plugins is not None and "gatefuse" not in plugins.split(","):
        text = f"VLLM_PLUGINS={plugins} keeps it off"
        yield Check("vLLM's plugin", "problem", text, "add gatefuse to VLLM_PLUGINS, or unset it")
    else:
        yield _plugin_in_vllm()


# Importing vLLM takes long, and changing it is not for this process.
_LOAD_PLUGIN = """
import importlib, importlib.metadata, json, logging
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.gatefuse").addHandler(handler)
for entry in importlib.metadata.entry_points(group="vllm.general_plugins", name="gatefuse"):
    entry.load()()
from gatefuse.integrations.vllm import moe_runner
runner = importlib.import_module(moe_runner.RUNNER_MODULE).MoERunner
problem = None if lines else moe_runner.problem_of(runner)
print()
print(json.dumps(lines + [problem] * bool(problem)))
"""


def _plugin_in_vllm() -> Check:
    subject, advice = "vLLM's plugin", f"a tested vLLM is {' or '.join(TESTED_VLLM)}"
    # What it turns off has a line of its own.
    env = {name: value for name, value in os.environ.items() if name != "GATEFUSE_DISABLE"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD_PLUGIN],
            env=env,
            capture_output=True,
            text=True,
            timeout=VLLM_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        text = f"not checked: vLLM was not imported within {VLLM_TIMEOUT:.0f} s"
        return Check(subject, "warning", text)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check(subject, "problem", f"vLLM's MoE layer cannot be imported: {last}", advice)
    if lines := json.loads(done.stdout.splitlines()[-1]):
        return Check(subject, "problem", " ".join(lines), advice)
    return Check(subject, "ok", "loads, and knows this vLLM's MoE layer")


def _variables(found: dict[str, Any]) -> Iterator[Check]:
    for name, advice in settings.unknown_variables().items():
        yield Check(name, "problem", "unknown: it does nothing", advice)
    for name, variable in settings.VARIABLES.items():
        try:
            value = variable.read()
        except ValueError as e:
            yield Check(name, "problem", str(e).partition(f"{name} ")[2])
            continue
        if value is None:
            continue
        if name == "GATEFUSE_DISABLE" and value:
            yield Check(name, "problem", "nothing is fused", "unset it")
        elif name == "GATEFUSE_DUMP" and (reason := _not_writable(value)) is not None:
            text = f"{value} cannot be written ({reason}): there will be no dump"
            yield Check(name, "problem", text, "name another folder")
        else:
            yield Check(name, "ok", f"{os.environ[name]}: {variable.effect}")
    if not found["variables"]:
        yield Check("GATEFUSE_ variables", "ok", "none is set")


_CHECKS: tuple[Callable[[dict[str, Any]], Iterator[Check]], ...] = (
    _versions,
    _triton,
    _devices,
    _cpp_compiler,
    _cache_folder,
    _caches,
    _compile_switches,
    _hooks,
    _backend,
    _vllm,
    _variables,
)
_NEED_INDUCTOR = (_caches, _compile_switches, _hooks, _backend)

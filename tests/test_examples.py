"""Each example runs as a user would run it, and its own checks pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, **variables},
    )


def test_every_example_is_tested() -> None:
    tested = {"handwritten_gate.py", "transformers_model.py", "dump_graphs.py"}
    tested.add("vllm_offline.py")  # with vLLM in tests/vllm_cpu
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def need_backend_name() -> None:
    from torch._dynamo import list_backends

    if "gatefuse" not in list_backends():
        pytest.skip("gatefuse is not installed, so that its backend has no name")


def test_handwritten_gate() -> None:
    need_backend_name()
    done = run("handwritten_gate.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout


def test_handwritten_gate_fails_unfused() -> None:
    need_backend_name()
    done = run("handwritten_gate.py", GATEFUSE_DISABLE="1")
    assert done.returncode == 1, done.stdout + done.stderr


def test_transformers_model() -> None:
    pytest.importorskip("transformers")
    done = run("transformers_model.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_dump_graphs(tmp_path: Path) -> None:
    pytest.importorskip("depyf")
    done = run("dump_graphs.py", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("*gatefuse_after*.py"))


def test_dump_graphs_without_depyf(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "depyf.py").write_text("raise ImportError('hidden')\n")
    path = os.pathsep.join([str(hidden), str(EXAMPLES.parent)])
    done = run("dump_graphs.py", str(tmp_path / "dump"), PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "depyf is not installed" in done.stdout
    assert (tmp_path / "dump" / "report.json").is_file()


def test_vllm_offline_without_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('hidden')\n")
    path = os.pathsep.join([str(tmp_path), str(EXAMPLES.parent)])
    done = run("vllm_offline.py", "model", PYTHONPATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "needs vLLM" in done.stderr

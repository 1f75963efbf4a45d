"""`gatefuse doctor`: each thing that keeps gates from being fused is named, with what to do."""

from __future__ import annotations

import json
import re
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config

import gatefuse
from gatefuse import cli, compat, doctor, settings
from gatefuse import environment as environment_module
from gatefuse.doctor import Check
from tests.support.hooks import HOOK, Watcher
from tests.support.programs import REPOSITORY, run_python

USAGE = (REPOSITORY / "docs" / "usage.md").read_text()


class EntryPoint:
    """One that is installed, of this gatefuse."""

    dist = None

    def load(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if gatefuse were installed, and vLLM not, whatever is the case here."""
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [EntryPoint()])
    find = environment_module.version
    monkeypatch.setattr(
        environment_module, "version", lambda name: None if name == "vllm" else find(name)
    )


def found(subject: str) -> Check:
    (check,) = (c for c in doctor.diagnose().checks if c.subject == subject)
    return check


def test_nothing_is_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the suite runs, gates are fused: the doctor must not find a problem."""
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "gatefuse can fuse gates here" in out.splitlines()[-1]
    assert "problem" not in out and "cannot be checked" not in out


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("GATEFUSE_EAGR_ROUNDING", "did you mean GATEFUSE_EAGER_ROUNDING?"),
        ("GATEFUSE_DISABLED", "did you mean GATEFUSE_DISABLE?"),
        ("GATE_FUSE_EXPECT", "did you mean GATEFUSE_EXPECT?"),
        ("gatefuse_dump", "did you mean GATEFUSE_DUMP?"),
        ("GATEFUSE_XYZ", "known are GATEFUSE_PLACEMENT, "),
    ],
)
def test_a_misspelt_variable(monkeypatch: pytest.MonkeyPatch, name: str, advice: str) -> None:
    monkeypatch.setenv(name, "1")
    check = found(name)
    assert (check.status, check.text) == ("problem", "unknown: it does nothing")
    assert check.advice.startswith(advice)
    assert cli.main(["doctor"]) == 1


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("GATEFUSE_PLACEMENT", "fast", "must be auto, inline or kernel, got 'fast'"),
        ("GATEFUSE_EAGER_ROUNDING", "maybe", "must be 1 or 0, got 'maybe'"),
        ("GATEFUSE_BATCH_INVARIANT", "2", "must be 1 or 0, got '2'"),
        ("GATEFUSE_EXPECT", "two", "must be a number of gates, 0 or more, got 'two'"),
        ("GATEFUSE_EXPECT", "-1", "must be a number of gates, 0 or more, got '-1'"),
        ("GATEFUSE_DISABLE", "perhaps", "must be 1 or 0, got 'perhaps'"),
        ("GATEFUSE_ALLOW_UNTESTED_TORCH", "so", "must be 1 or 0, got 'so'"),
        ("GATEFUSE_DISABLE", "1", "nothing is fused"),
    ],
)
def test_a_variable_with_a_value_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv(name, value)
    check = found(name)
    assert (check.status, check.text) == ("problem", text)


def test_variables_that_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GATEFUSE_PLACEMENT", "Inline")
    monkeypatch.setenv("GATEFUSE_DUMP", str(tmp_path / "made" / "later"))
    monkeypatch.setenv("GATEFUSE_DISABLE", "0")
    diagnosis = doctor.diagnose()
    assert diagnosis.problems == []
    assert {c.subject for c in diagnosis.checks} >= {"GATEFUSE_PLACEMENT", "GATEFUSE_DUMP"}
    assert not (tmp_path / "made").exists()


def test_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "folder")
    monkeypatch.setenv("GATEFUSE_DUMP", place)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", place)
    problems = {check.subject: check.text for check in doctor.diagnose().problems}
    assert set(problems) == {"GATEFUSE_DUMP", "Inductor's cache"}
    assert all(place in text and "Not a directory" in text for text in problems.values())


def test_inductor_without_its_folder(tmp_path: Path) -> None:
    """Its import fails then; the doctor's does not."""
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "folder")
    code = "import sys; from gatefuse.cli import main; print(main(['doctor']))"
    out = run_python(code, TORCHINDUCTOR_CACHE_DIR=place).stdout
    assert f"Inductor's cache: {place} cannot be written" in out
    assert "Inductor: cannot be imported: " in out
    assert "cannot be checked" not in out, "one cause is told once"
    assert out.endswith("\n1\n")


def test_what_turns_compiling_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_FX_COMPILE_MODE", "async+SUBPROCESS")
    with dynamo_config.patch(disable=True):
        assert [check.subject for check in doctor.diagnose().problems] == [
            "TORCHDYNAMO_DISABLE=1",
            "TORCH_COMPILE_DISABLE=1",
            "TORCHINDUCTOR_FX_COMPILE_MODE=async+SUBPROCESS",
        ]


def test_freezing() -> None:
    with inductor_config.patch(freezing=True):
        assert found("freezing").status == "warning"


def test_variables_of_torch() -> None:
    """In a process of its own: torch reads them when it is imported."""
    code = """
        from torch._inductor import compile_fx
        from gatefuse import doctor
        print(compile_fx.fx_compile_mode.name)
        print(doctor.diagnose())
    """
    out = run_python(
        code,
        TORCH_COMPILE_DISABLE="1",
        TORCHINDUCTOR_FREEZING="1",
        TORCHINDUCTOR_FX_COMPILE_MODE="subprocess",
        TORCHINDUCTOR_FX_GRAPH_CACHE="1",
    ).stdout
    assert out.startswith("SUBPROCESS\n"), "the mode that the doctor warns of is torch's"
    for line in (
        "problem   TORCH_COMPILE_DISABLE=1: ",
        "problem   TORCHINDUCTOR_FX_COMPILE_MODE=subprocess: ",
        "warning   freezing: ",
        "ok        Inductor's cache of graphs: on",
    ):
        assert f"\n{line}" in out


def test_caches_that_are_off() -> None:
    with inductor_config.patch(force_disable_caches=True):
        assert found("Inductor's cache of graphs").text.startswith("off")


def test_hooks_in_this_process() -> None:
    def plain(graph: Any) -> None:
        pass

    assert "gatefuse is on none" in found("Inductor's hooks").text
    with inductor_config.patch({HOOK: Watcher("mine", [])}):
        assert found(HOOK).status == "ok"
        assert "Watcher" in found(HOOK).text
        with gatefuse.fusing(placement="inline"):
            checks = [c for c in doctor.diagnose().checks if c.subject == HOOK]
            assert ["Watcher" in checks[0].text, "inline" in checks[1].text] == [True, True]
    with inductor_config.patch({HOOK: plain}):
        assert found(HOOK).status == "warning"
        assert "plain has no uuid()" in found(HOOK).text


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(environment_module, "_gpus", list)
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        check = found("C++ compiler")
        assert check.status == "problem"
        assert "CXX=no-such-compiler does not run" in check.text
        monkeypatch.setattr(environment_module, "_gpus", lambda: ["cuda:0 NVIDIA H200"])
        assert found("C++ compiler").status == "warning"  # models on the GPU compile


def test_no_python_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "python3-dev" in found("Python.h").advice


@pytest.mark.parametrize(
    ("devices", "triton", "status"),
    [
        (["cpu"], None, "ok"),
        (["cuda:0 NVIDIA H200"], None, "problem"),
        (["cuda:0 NVIDIA H200"], "3.7.1", "ok"),
        (["cuda:0 NVIDIA H200"], "3.70.0", "warning"),
    ],
)
def test_triton(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], triton: str | None, status: str
) -> None:
    versions = {"torch": "2.13.0+cpu", "triton": triton}
    version: Callable[[str], str | None] = environment_module.version
    monkeypatch.setattr(
        environment_module,
        "version",
        lambda name: versions[name] if name in versions else version(name),
    )
    monkeypatch.setattr(environment_module, "_gpus", lambda: [d for d in devices if d != "cpu"])
    assert found("Triton").status == status


def test_versions_outside_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.12.0", "vllm": None}
    version: Callable[[str], str | None] = environment_module.version
    monkeypatch.setattr(
        environment_module,
        "version",
        lambda name: versions[name] if name in versions else version(name),
    )
    monkeypatch.setattr("platform.python_version", lambda: "3.10.2")
    monkeypatch.setattr(environment_module, "_gpus", lambda: ["cuda:0 NVIDIA H200"])
    statuses = {c.subject: c.status for c in doctor.diagnose().checks}
    assert [statuses[s] for s in ("PyTorch", "Python", "devices")] == ["warning"] * 3


def test_a_torch_that_is_not_supported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compat, "TESTED_TORCH", ((1, 0), (1, 1)))
    assert cli.main(["env"]) == 1
    assert "nothing is fused: PyTorch" in capsys.readouterr().out
    # The one variable that matters there may be wrong itself.
    monkeypatch.setenv("GATEFUSE_ALLOW_UNTESTED_TORCH", "maybe")
    assert "must be 1 or 0" in found("PyTorch").text


def test_a_check_that_fails_is_a_problem_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("gatefuse.inductor.hooks.PRE_HOOK")
    check = found("hooks")
    assert check.status == "problem"
    assert "AttributeError" in check.text


def test_gatefuse_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])
    check = found('backend="gatefuse"')
    assert check.status == "problem"
    assert "pip install" in check.advice


def test_another_gatefuse_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        version = "0.0.1"

    monkeypatch.setattr(EntryPoint, "dist", Distribution)
    check = found('backend="gatefuse"')
    assert check.status == "warning"
    assert "0.0.1" in check.text


# A stand-in for vLLM, with a runner that the integration knows.
RUNNER = """
import torch

inputs = "Tensor hidden_states, Tensor router_logits, Tensor? shared_experts_input"
torch.library.define("vllm::moe_forward_shared", f"({inputs}, str layer) -> (Tensor, Tensor)")

class MoERunner:
    def __init__(self, layer_name, shared_experts): ...
    def _select_forward(self): ...
    def register_oot(self): ...
"""
WRAPPER = "class TorchCompileWithNoGuardsWrapper: ..."
ENTRY = "[vllm.general_plugins]\ngatefuse = gatefuse.integrations.vllm:register\n"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Check]:
    """Finds what the doctor says of the plugin, beside a vLLM with this runner and version."""

    def check_of(runner: str, entry: str = ENTRY) -> Check:
        module = tmp_path / "vllm/model_executor/layers/fused_moe/runner/moe_runner.py"
        module.parent.mkdir(parents=True)
        for parent in [*module.parents][: len(module.parents) - len(tmp_path.parents) - 1]:
            (parent / "__init__.py").touch()
        module.write_text(runner)
        (tmp_path / "vllm/model_executor/custom_op.py").write_text("op_registry_oot = {}")
        (tmp_path / "vllm/compilation").mkdir()
        (tmp_path / "vllm/compilation/wrapper.py").write_text(WRAPPER)
        info = tmp_path / "gatefuse-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gatefuse\nVersion: 0\n")
        (info / "entry_points.txt").write_text(entry)
        # The child's search path: the stand-ins first.
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
        monkeypatch.setattr(
            environment_module, "version", lambda name: {"vllm": "0.26.0"}.get(name, "0.0")
        )
        return found("vLLM's plugin")

    return check_of


def test_the_plugin_loads_in_vllm(vllm: Callable[..., Check]) -> None:
    check = vllm(RUNNER)
    assert (check.status, check.text) == ("ok", "loads, and knows this vLLM's MoE layer")
    assert "vllm" not in sys.modules


def test_a_vllm_that_looks_different(vllm: Callable[..., Check]) -> None:
    check = vllm(RUNNER.replace("Tensor router_logits, ", ""))
    assert (check.status, check.text) == (
        "problem",
        "its MoE op takes or returns something else than is known",
    )


def test_a_vllm_that_cannot_be_imported(vllm: Callable[..., Check]) -> None:
    check = vllm("import no_such_extension")
    assert check.status == "problem"
    assert "No module named 'no_such_extension'" in check.text


def test_a_vllm_that_takes_too_long(
    vllm: Callable[..., Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "VLLM_TIMEOUT", 0.1)
    check = vllm("import time; time.sleep(60)")
    assert (check.status, "not checked" in check.text) == ("warning", True)


def test_the_plugin_is_kept_off(
    vllm: Callable[..., Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    check = vllm(RUNNER)
    assert check.status == "problem"
    assert "add gatefuse to VLLM_PLUGINS" in check.advice


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    # Of these scripts may depend: docs/usage.md, what is stable.
    assert {"python", "torch", "devices", "variables", "unsupported", "checks"} <= set(content)
    assert {tuple(check) for check in content["checks"]} == {
        ("subject", "status", "text", "advice")
    }


# What the documentation, the settings and the doctor say of the same things.


def test_the_documentation_has_every_variable_and_no_other() -> None:
    tables = {
        name: [cell.strip().replace("`", "") for cell in row.strip("|").split("|")]
        for row in re.findall(r"(?m)^\|.*`GATEFUSE_.*$", USAGE)
        for name in re.findall(r"`(GATEFUSE_[A-Z_]+)", row)
    }
    assert set(tables) == set(settings.VARIABLES)
    for name, cells in tables.items():
        variable = settings.VARIABLES[name]
        if variable.option is not None:
            assert cells[:3] == [
                variable.option,
                name,
                variable.values,
            ]
    options = {variable.option for variable in settings.VARIABLES.values()} - {None}
    assert options == {field.name for field in fields(settings.Options)}
    for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        named = set(re.findall(r"GATEFUSE_[A-Z_]*[A-Z]", path.read_text()))
        assert named <= set(settings.VARIABLES) | {"GATEFUSE_EAGR_ROUNDING"}, path
    readme = (REPOSITORY / "README.md").read_text()
    assert set(re.findall(r"`(GATEFUSE_[A-Z_]+)", readme)) == set(settings.VARIABLES)


def test_the_package_reads_no_other_variable() -> None:
    named = {
        name
        for path in (REPOSITORY / "gatefuse").rglob("*.py")
        for name in re.findall(r"GATEFUSE_[A-Z_]*[A-Z]", path.read_text())
    }
    assert named == set(settings.VARIABLES)


def test_the_doctor_knows_the_support_matrix() -> None:
    rows = re.findall(r"(?m)^\| (\d+\.\d+) \| (\S*) *\| (\w+) \| (\w+).*$", USAGE)
    assert {torch: triton for torch, triton, cpu, _ in rows if cpu == "tested"} == (
        doctor.TESTED_TRITON
    )
    on_gpus = {torch for torch, _, _, gpu in rows if gpu == "tested"}
    assert on_gpus == set(doctor.TESTED_GPUS)
    vllm = re.findall(r"(?m)^\| (\d+\.\d+\.\d+) \| .* tested: .*$", USAGE)
    assert tuple(vllm) == doctor.TESTED_VLLM
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pythons = [c.split(" :: ")[-1] for c in project["classifiers"] if " :: 3." in c]
    assert tuple(pythons) == doctor.TESTED_PYTHON


def test_a_misspelt_variable_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where options are resolved: nobody runs the doctor before each program."""
    monkeypatch.setattr(settings, "_warned", set())
    monkeypatch.setenv("GATEFUSE_EAGR_ROUNDING", "1")
    with pytest.warns(UserWarning, match="EAGR_ROUNDING is unknown.*did you mean GATEFUSE_EAGER_"):
        gatefuse.options()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gatefuse.options()

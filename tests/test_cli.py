"""The `gatefuse` command: exit codes, messages, and a demo that can fail."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from gatefuse import cli, demo
from gatefuse.demo import models

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_env_is_another_name_of_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    """Templates of issues, and scripts, ask for it."""
    outputs = []
    for name in ("env", "doctor"):
        cli.main([name, "--json"])
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    assert outputs[0]["torch"] == torch.__version__
    assert outputs[0]["unsupported"] is None


def test_usage_error() -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2


def test_demo_without_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if _is_builtin(f)])
    assert cli.main(["demo"]) == 2
    assert "pip install 'gatefuse[demo]'" in capsys.readouterr().err


def _is_builtin(finder: object) -> bool:
    return getattr(finder, "__module__", "").startswith("_frozen_importlib")


@pytest.mark.parametrize("device", ["nonsense", "xpu:99", "cuda:99"])
def test_demo_on_a_device_that_is_not_there(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    assert cli.main(["demo", "--device", device]) == 2
    assert "device" in capsys.readouterr().err


def test_demo_passes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    if "gatefuse" not in torch._dynamo.list_backends():
        pytest.skip("gatefuse is not installed, so that its backend has no name")
    arguments = ["demo", "--device", "cpu", "--model", "qwen2_moe", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    (model,) = found["models"]
    assert found["passed"]
    assert model["gates"] == model["sites"] == model["op_nodes"] == 2
    assert 0 < model["differences"]["gatefuse_vs_eager"] < 1


def test_demo_fails_when_nothing_is_fused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # compiles nothing: faster
    assert cli.main(["demo", "--device", "cpu", "--model", "qwen2_moe"]) == 1
    out = capsys.readouterr().out
    assert "0 of 2 gates were fused" in out
    assert "GATEFUSE_DISABLE" in out


def test_demo_sees_a_wrong_result() -> None:
    reference = torch.randn(4, 64, dtype=torch.float64)
    eager = reference.bfloat16()
    good, problems = demo._differences(eager, eager, eager, reference, torch.bfloat16)
    assert problems == []
    assert good.gatefuse_vs_fp64 == good.eager_vs_fp64
    one_off = eager.clone()
    one_off[0, 0] += 1
    _, problems = demo._differences(eager, eager, one_off, reference, torch.bfloat16)
    assert any("worst element" in p for p in problems)
    _, problems = demo._differences(eager, eager, eager * 1.02, reference, torch.bfloat16)
    assert any("root mean square" in p for p in problems)
    _, problems = demo._differences(eager, eager, eager * torch.nan, reference, torch.bfloat16)
    assert any("not finite" in p for p in problems)


def test_demo_sees_a_wrong_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate stuck at one half, in one layer, is outside the demo's bound."""
    pytest.importorskip("transformers")
    device, dtype = torch.device("cpu"), torch.bfloat16
    with torch.no_grad(), models.quiet():
        model = models.build("qwen2_moe", wide=False, device=device, dtype=dtype)
        ids = torch.randint(0, model.config.vocab_size, demo.CHECK_TOKENS)
        eager = models.forward(model, ids)
        model.model.layers[1].mlp.shared_expert_gate.weight.zero_()
        stuck = models.forward(model, ids)
        exact = models.build("qwen2_moe", wide=False, device=device, dtype=dtype).double()
        exact.set_experts_implementation("eager")
        reference = models.forward(exact, ids)
    _, problems = demo._differences(eager, eager, eager, reference, dtype)
    assert problems == []
    _, problems = demo._differences(eager, eager, stuck, reference, dtype)
    assert problems

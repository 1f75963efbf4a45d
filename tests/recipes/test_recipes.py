"""Every recipe of docs/recipes.md is run as it stands there, and does what the page says."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gatefuse
from tests.recipes import page
from tests.recipes.page import LAYERS, Model, loss_of, recipes, tokens
from tests.support.comparison import INSTALLED
from tests.support.judge import judge

pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="gatefuse is not installed, so its backend has no name"
)
REFUSED = r"'GATEFUSE' is not a valid DynamoBackend"


def fused(report: gatefuse.Report) -> list[int]:
    return [g.fused for g in report.graphs if g.phase != "backward" and g.fused]


def check_loss(compiled: Any) -> None:
    """The loss of the compiled model is that of a fresh one in eager PyTorch."""
    model = Model()
    with torch.no_grad():
        eager, exact = loss_of(model), loss_of(model.double())
        judge("loss", loss_of(compiled), eager, exact)


def test_every_recipe_is_tested() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    assert set(recipes()) == set(re.findall(r'(?:page\.run|step)\(\s*"(\w+)"', text))


def test_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from tests.support.models import build

    # By itself, transformers compiles on accelerators only.
    monkeypatch.setattr(transformers.CompileConfig, "_compile_all_devices", True)
    config = build("qwen2_moe", num_hidden_layers=1, use_cache=True).model.config
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    prompt = {"input_ids": tokens(batch=1), "attention_mask": torch.ones_like(tokens(batch=1))}
    names = page.run("generate", model=model, prompt=prompt)
    # One graph: the decode step. The prompt's step is not compiled.
    assert [(g.phase, g.fused) for g in names["report"].graphs] == [("inference", 1)]
    assert [site.rows for site in names["report"].sites] == ["1"]
    eager = model.generate(**prompt, max_new_tokens=4)
    assert torch.equal(names["tokens"], eager)


def dataset() -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in tokens(batch=4)]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate keeps state for the whole process; each test has its own, and no GPU."""
    state = pytest.importorskip("accelerate.state")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


def test_trainer(on_the_cpu: None, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = Model()
    with gatefuse.record() as report:
        names = page.run("trainer", model=model, gates=LAYERS, dataset=dataset(), folder=tmp_path)
    assert names["trainer"].state.global_step == 2
    assert fused(report) == [LAYERS], report


def test_trainer_refuses_the_name(on_the_cpu: None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, torch_compile_backend="gatefuse"
    )
    with pytest.raises(ValueError, match=REFUSED):
        transformers.Trainer(Model(), arguments, train_dataset=dataset())


def test_accelerate(on_the_cpu: None) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters())
    batch = {"input_ids": tokens(), "labels": tokens()}
    given = dict(model=model, optimizer=optimizer, gates=LAYERS, batch=batch)
    before = copy.deepcopy(model.state_dict())
    with gatefuse.record() as report:
        names = page.run("accelerate", **given)
    assert fused(report) == [LAYERS], report
    untrained = Model()
    with torch.no_grad():
        judge("loss", names["loss"], loss_of(untrained), loss_of(untrained.double()))
    assert any(not torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_accelerate_refuses_the_name(on_the_cpu: None) -> None:
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=REFUSED):
        accelerate.Accelerator(dynamo_backend="gatefuse")


def test_compile_each_layer() -> None:
    model = Model()
    with torch.no_grad(), gatefuse.record() as report:
        page.run("layers", model=model)
        check_loss(model)
    assert fused(report) == [1], report


def test_nested_compile_region(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    layer_class = type(model.layers[0])
    monkeypatch.setattr(layer_class, "forward", layer_class.forward)  # put back afterwards
    with torch.no_grad(), gatefuse.record() as report:
        compiled = page.run("nested", model=model)["model"]
        check_loss(compiled)
    assert [(g.phase, g.fused) for g in report.graphs if g.fused] == [("subgraph", 1)], report

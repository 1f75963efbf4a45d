"""`gatefuse.scan` and `gatefuse scan`: the verdict of a compilation, without one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering

import gatefuse
from gatefuse import cli
from tests.support import models
from tests.support.cuda_codegen import cuda_codegen, on_cuda
from tests.support.form_table import FORMS, Form
from tests.support.forms import Gate, H, linear, make_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

PLAIN = [f for f in FORMS if not f.coordinate_descent and not f.autocast]
#: Every fifth: all of them agree, and take minutes.
SOME = [*PLAIN[::5], *(f for f in PLAIN if f.grad)][:24]


class Layer(nn.Module):
    def __init__(self, number: int, kind: str = "a") -> None:
        super().__init__()
        self.number = number
        self.heads = 3  # a number of its own, which is the number of one layer
        self.kind = kind
        self.norm = nn.LayerNorm(H)
        self.up = nn.Linear(H, H)
        self.gate = nn.Linear(H, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "ungated":
            return x + self.up(y)
        return x + torch.sigmoid(self.gate(y)) * self.up(y)


class Stack(nn.Module):
    def __init__(self, kinds: str = "aaaaaa") -> None:
        super().__init__()
        names = {"a": "a", "b": "b", "u": "ungated"}
        self.layers = nn.ModuleList(Layer(i, names[kind]) for i, kind in enumerate(kinds))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Counting(Stack):
    """It cannot be run with fewer layers."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(6):
            x = self.layers[i](x)
        return x


class Routed(nn.Module):
    """What each expert gets depends on the data: Dynamo leaves this module to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, 4)
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for number in range(4):
            rows = torch.nonzero(chosen == number).squeeze(-1)
            if rows.numel() == 0 or chosen.max().item() < 0:
                continue
            out[rows] = self.experts[number](x[rows])
            out[chosen == number] += x[chosen == number] * (x > 0).sum().tolist()
        return out


class SharedExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.routed = Routed()
        self.gate = nn.Linear(H, 1)
        self.shared = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + torch.sigmoid(self.gate(x)) * self.shared(x)


X = torch.zeros(5, H)


def placements(report: gatefuse.Report) -> list[tuple[Any, ...]]:
    return sorted(
        (s.placement, s.placement_reason, s.rows != "", s.has_addend, s.has_bias, s.keeps_logit)
        for g in report.graphs
        if g.phase != "backward"
        for s in g.sites
    )


def reasons(report: gatefuse.Report) -> list[str]:
    return sorted(r.reason for g in report.graphs if g.phase != "backward" for r in g.rejections)


# --- the same answers as a compilation's --------------------------------------------------------


def dynamic_of(form: Form) -> bool | None:
    return {"all": True, "rows": None, "": False}[form.dynamic]


@pytest.mark.parametrize("form", SOME, ids=lambda form: form.id)
def test_says_what_explain_says_on_the_cpu(form: Form) -> None:
    torch._dynamo.reset()
    with gatefuse.fusing() as real, torch.set_grad_enabled(form.grad):
        torch.compile(form.fn, dynamic=dynamic_of(form))(*form.inputs())
    said = gatefuse.scan(
        form.fn, form.inputs(), device="cpu", training=form.grad, dynamic=form.dynamic == "all"
    )
    assert placements(said) == placements(real)
    assert reasons(said) == reasons(real)
    assert len(said.sites) == len(real.sites)
    assert [g.phase for g in said.graphs].count("backward") == int(form.grad)


#: PyTorch without CUDA cannot index a tensor on a GPU, fake or not: no code to compare with.
INDEXED = ("weight-row-of-table", "mv-3d", "padded", "strided-rows")
ON_A_GPU = [f for f in PLAIN if not f.grad and not f.id.startswith(INDEXED)]


@pytest.mark.parametrize("form", ON_A_GPU[::4], ids=lambda form: form.id)
def test_says_what_the_code_for_a_gpu_has(form: Form) -> None:
    inputs = form.inputs()
    with cuda_codegen(), gatefuse.fusing(placement=form.gpu_placement) as real, torch.no_grad():
        torch.compile(form.fn, dynamic=dynamic_of(form))(*map(on_cuda, inputs))
    assert {s.placement for s in real.sites} <= {"inline", "kernel"}
    with gatefuse.fusing(placement=form.gpu_placement):
        said = gatefuse.scan(form.fn, inputs, device="cuda", dynamic=form.dynamic == "all")
    assert placements(said) == placements(real)
    assert reasons(said) == reasons(real)


def by_matmul(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w.t()) * (v @ v.t() @ v)


def into_matmul(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (torch.sigmoid(x @ w.t()) * v) @ v.t()


def by_activation(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w.t()) * torch.relu(v)


def input_by_activation(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(torch.relu(x) @ w.t()) * v


def into_activation(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.relu((torch.sigmoid(x @ w.t()) * v).view(-1))


def part_of_matmul(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w.t()) * torch.split(v @ torch.cat([v] * 20).t(), H, -1)[0]


def second_gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w.t()) * (torch.sigmoid(v @ w.t()) * v)


def by_topk(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w.t()) * torch.topk(v, H, dim=-1)[0]


def by_mean(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w.t()) * torch.var_mean(v.unsqueeze(0), dim=0, correction=0)[1]


def concatenated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    left, right = torch.split(v, H // 2, -1)
    return torch.sigmoid(x @ w.t()) * torch.cat([right, left @ left.t() @ left], -1)


def concatenated_activations(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    left, right = torch.split(torch.relu(v), H // 2, -1)
    return torch.sigmoid(x @ w.t()) * torch.cat([torch.tanh(right), left.sin()], -1)


NEIGHBOURS = [
    concatenated_activations,
    by_matmul,
    into_matmul,
    by_activation,
    input_by_activation,
    into_activation,
]
NEIGHBOURS += [part_of_matmul, second_gate, by_topk, by_mean, concatenated]


@pytest.mark.parametrize("fn", NEIGHBOURS, ids=lambda fn: fn.__name__)
def test_says_what_neighbours_decide(fn: Callable[..., Tensor]) -> None:
    inputs = [torch.zeros(size, dtype=torch.bfloat16) for size in ((5, H), (1, H), (5, H))]
    with cuda_codegen(), gatefuse.fusing() as real, torch.no_grad():
        torch.compile(fn)(*map(on_cuda, inputs))
    said = gatefuse.scan(fn, inputs, device="cuda")
    assert real.fused
    assert placements(said) == placements(real)


def test_both_placements_are_predicted() -> None:
    alone = gatefuse.scan(linear, make_inputs(linear), device="cuda")
    assert [s.placement for s in alone.sites] == ["kernel"]
    among = gatefuse.scan(Stack("aa"), (X,), device="cuda")
    assert {s.placement for s in among.sites} == {"inline"}
    assert "cuda, which is not here" in str(among) or torch.cuda.is_available()


def test_options_of_the_block_are_followed() -> None:
    with gatefuse.fusing(placement="inline"):
        report = gatefuse.scan(linear, make_inputs(linear), device="cuda")
    assert [s.placement for s in report.sites] == ["inline"]


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next", "deepseek_v3"])
def test_models_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    model = models.build(name, torch.bfloat16)
    gates = models.gates(model)
    report = gatefuse.scan(model, (models.embeddings(1, 6, torch.bfloat16),), device="cuda")
    assert report.model is not None
    assert len(report.model.gates) == len(report.model.fused) == gates == report.fused
    assert str(report).startswith(
        f"gatefuse: {gates} of {gates} gates fuse\n" if gates else "gatefuse: no gate"
    )
    assert all(p.device.type == "cpu" for p in model.parameters())


# --- what it costs, and what it leaves ----------------------------------------------------------


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Gate()
    model.compile()
    inputs = (torch.randn(5, H), torch.randn(5, H))
    with torch.no_grad():
        expected = model(*inputs)
    compiled = model._compiled_call_impl
    before = files(tmp_path), dict(inductor_config.get_config_copy())
    random, training = torch.get_rng_state(), model.training

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        torch.set_default_dtype(torch.bfloat16)
        torch.manual_seed(0)
        return Gate(), (torch.zeros(5, H), torch.zeros(5, H))

    for target, args in ((model, inputs), (build, ())):
        assert gatefuse.scan(target, args).fused == 1
        gatefuse.scan(target, args, training=True)
    assert (files(tmp_path), dict(inductor_config.get_config_copy())) == before
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training == training
    assert model._compiled_call_impl is compiled
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())
    with gatefuse.record() as later, torch.no_grad():
        assert torch.equal(model(*inputs), expected)
    assert later.activity.graphs == 0


def test_no_code_is_tied_to_a_function() -> None:
    gatefuse.scan(linear, make_inputs(linear))
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    assert _debug_get_cache_entry_list(linear.__code__) == []


def test_neither_compiler_nor_memory_is_needed(tmp_path: Path) -> None:
    program = (
        "import torch, gatefuse\n"
        "from torch import nn\n"
        "class Wide(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.gate, self.up = nn.Linear(1 << 20, 1), nn.Linear(1 << 20, 1 << 20)\n"
        "    def forward(self, x):\n"
        "        return torch.sigmoid(self.gate(x)) * self.up(x)\n"
        "report = gatefuse.scan(lambda: (Wide(), (torch.zeros(4, 1 << 20),)), device='cuda')\n"
        "assert report.fused == 1, report\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    root = str(Path(__file__).parents[1])
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize(
    "name, gates", [("qwen3-next-80b-a3b", 48), ("qwen3.5-397b-a17b", 60)], ids=["80B", "397B"]
)
def test_real_models(name: str, gates: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    config = Path(__file__).parents[1] / "examples" / "configs" / f"{name}.json"
    start = time.process_time()
    command = ["scan", "--config", str(config), "--device", "cuda", "--expect", str(gates)]
    assert cli.main([*command, "--json"]) == 0
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == f"{gates} of {gates} gates fuse"
    names = [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(gates)]
    assert report["model"]["fused"] == names
    assert f"model.layers.4-{gates - 1} are built like model.layers.0-3" in report["model"]["note"]
    (graph,) = report["graphs"]
    assert {s["placement"] for s in graph["sites"]} == {"inline"}
    assert {s["layer"] for s in graph["sites"]} == {
        n.removesuffix(".shared_expert_gate") for n in names
    }


# --- layers that are alike ----------------------------------------------------------------------


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if n.endswith("gate")]


def test_alike_layers_are_scanned_once() -> None:
    model = Stack()
    report = gatefuse.scan(model, (X,))
    assert report.model is not None
    assert report.model.gates == report.model.fused == linears(model)
    assert report.fused == 6
    assert "layers.2-5 are built like layers.0-1" in report.model.note
    assert "in layers.0-5" in str(report)
    assert len(model.layers) == 6


@pytest.mark.parametrize("kinds, scanned", [("aabaab", 3), ("uaaaaa", 2), ("aaaaau", 6)])
def test_each_kind_of_layer_is_scanned(kinds: str, scanned: int) -> None:
    model = Stack(kinds)
    report = gatefuse.scan(model, (X,))
    gated = [f"layers.{i}.gate" for i, kind in enumerate(kinds) if kind != "u"]
    assert report.model is not None
    assert report.model.gates == report.model.fused == gated
    assert report.model.not_compiled == [
        f"layers.{i}.gate" for i, k in enumerate(kinds) if k == "u"
    ]
    assert ("alone" in report.model.note) == (scanned < 6)


def test_a_model_that_counts_its_layers() -> None:
    report = gatefuse.scan(Counting(), (X,))
    assert report.model is not None
    assert report.model.fused == linears(Counting())
    assert report.model.note == ""


# --- what a model may be ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, args",
    [
        (Stack, (X,)),
        (lambda: Stack("aa"), (X,)),
        (lambda: (Stack("aa"), (X,)), ()),
        (lambda: (Stack("aa"), X), ()),
        (lambda: (Stack("aa"), (), {"x": X}), ()),
        (torch.compile(Stack("aa")), (X,)),
        (Stack("aa").to("meta"), (X,)),
        (Stack("aa"), (X.to("meta"),)),
    ],
    ids=["class", "builder", "args", "tensor", "kwargs", "compiled", "meta", "meta-input"],
)
def test_models_and_builders(target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    report = gatefuse.scan(target, args, device="cpu")
    assert report.fused in (2, 6)
    assert report.verdict == f"{report.fused} of {report.fused} gates fuse"


def test_training_has_both_graphs() -> None:
    for device in ("cpu", "cuda"):
        report = gatefuse.scan(Stack("aa"), (X,), device=device, training=True)
        assert [g.phase for g in report.graphs] == ["forward", "backward"]
        assert report.model is not None
        assert len(report.model.fused) == 2


def test_dynamic() -> None:
    report = gatefuse.scan(Stack("aa"), (X,), dynamic=True)
    assert all(not s.rows.isdigit() for s in report.sites)
    assert all(s.rows == "5" for s in gatefuse.scan(Stack("aa"), (X,)).sites)


def test_code_that_depends_on_data_runs_on() -> None:
    report = gatefuse.scan(SharedExpert(), (X,))
    with torch.no_grad():
        real = gatefuse.explain(SharedExpert(), torch.randn(5, H))
    for r in (report, real):
        assert r.model is not None
        assert r.model.gates == r.model.fused == ["gate"]
        assert r.activity.breaks
    assert gatefuse.scan(SharedExpert(), (X,), device="cuda", training=True).fused == 1


def test_a_scan_is_no_compilation_of_the_block_around_it() -> None:
    with pytest.raises(gatefuse.FusionError), gatefuse.fusing(expect=1) as report:
        assert gatefuse.scan(Stack("aa"), (X,)).fused == 2
    assert report.graphs == []
    assert GraphLowering.save_output_code is None


def test_expect() -> None:
    gatefuse.scan(Stack("aa"), (X,), expect=2)
    with pytest.raises(gatefuse.FusionError, match="at least 3"):
        gatefuse.scan(Stack("aa"), (X,), expect=3)


@pytest.mark.parametrize(
    "target, args, error, message",
    [
        (3, (), TypeError, "model_or_builder is of type int"),
        (Stack("aa"), X, TypeError, "args is of type Tensor"),
        (lambda: 3, (), gatefuse.ScanError, "a value of type int"),
        (lambda: 1 / 0, (), gatefuse.ScanError, "cannot be built: ZeroDivisionError"),
        (Stack("aa"), (torch.zeros(5, 3),), gatefuse.ScanError, "cannot be traced"),
    ],
    ids=["int", "tensor", "no-model", "broken", "wrong-width"],
)
def test_errors(target: Any, args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gatefuse.scan(target, args)


def test_a_device_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="cpu or cuda"):
        gatefuse.scan(Stack("aa"), (X,), device="nonsense")


# --- the command --------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.up = nn.Linear(width, 1), nn.Linear(width, width)

    def forward(self, x):
        return torch.sigmoid(self.gate(x)) * self.up(x)

def build(width=64):
    return Model(width), (torch.zeros(3, width),)

def only_the_model():
    return Model(64)

def broken():
    raise KeyError("vocab")

if __name__ == "__main__":
    import sys
    with torch.no_grad():
        torch.compile(Model(int(sys.argv[1])))(torch.zeros(3, 64))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "scanned_module.py"
    path.write_text(MODULE)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "unknown.json").write_text('{"model_type": "qwen99"}')
    (tmp_path / "wrong.json").write_text('{"model_type": "qwen2_moe", "num_hidden_layers": "many"}')
    return path


@pytest.mark.parametrize("target", ["scanned_module:build", "scanned_module.py:build"])
def test_command_with_a_builder(
    target: str, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["scan", target, "width=96", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("gatefuse: 1 of 1 gates fuse\n")
    assert "3 x 96" in text
    assert cli.main(["scan", "--expect", "2", target]) == 1


def test_command_with_a_script(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    assert cli.main(["scan", str(module), "--", "64"]) == 0
    assert "1 of 1 gates fused in 1 graph" in capsys.readouterr().out
    assert cli.main(["scan", str(module), "--", "wide"]) == 2
    assert "failed at scanned_module.py" in capsys.readouterr().err


def test_command_with_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    values = ["hidden_size=64", "num_hidden_layers=2", "num_experts=4", "vocab_size=32"]
    values += ["num_attention_heads=4", "num_key_value_heads=2", "num_experts_per_tok=2"]
    for name in ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"):
        command = ["scan", f"transformers:{name}", *values, "--tokens", "7", "--json"]
        assert cli.main(command) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["verdict"] == "2 of 2 gates fuse"
        assert {s["rows"] for s in report["graphs"][0]["sites"]} == {"7"}


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "name what to scan"),
        (["--config", "nothing.json"], "cannot be read"),
        (["--config", "scanned_module.py"], "is not JSON"),
        (["--config", "list.json"], 'no "model_type" in it'),
        (["--config", "unknown.json"], "no model type 'qwen99'"),
        (["--config", "wrong.json"], "not a valid configuration of qwen2_moe"),
        (["nothing.py"], "there is no file nothing.py"),
        (["nothing:build"], "cannot be imported"),
        (["scanned_module:nothing"], "has no nothing"),
        (["scanned_module:build", "depth=3"], "cannot be called so"),
        (["scanned_module:build", "depth"], "not of the form name=value"),
        (["scanned_module:only_the_model"], "expected (model, args)"),
        (["scanned_module:broken"], "cannot be built: KeyError"),
        (["scanned_module:Model"], "is a class"),
        (["scanned_module:build", "--device", "tpu"], "cpu or cuda"),
        (["scanned_module:build", "--tokens", "0"], "must be 1 or more"),
        (["scanned_module.py", "--device", "cuda"], "not for scripts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_errors(
    words: list[str], message: str, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--config" in words:
        pytest.importorskip("transformers")
    assert cli.main(["scan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("gatefuse: ")
    assert captured.err.count("\n") == 1


def test_command_without_transformers(
    monkeypatch: pytest.MonkeyPatch, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for words in (["--config", "list.json"], ["transformers:Qwen2MoeConfig"]):
        assert cli.main(["scan", *words]) == 2
        assert "pip install 'gatefuse[demo]'" in capsys.readouterr().err

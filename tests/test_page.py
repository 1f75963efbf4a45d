"""The page: what it says, that it is escaped and needs nothing else, and how a browser shows it."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gatefuse
from gatefuse import drawing, excerpts
from gatefuse.origin import without_folders
from gatefuse.records import DrawnNode, GraphReport, RejectionReport, SiteReport
from gatefuse.report import graph_from_dict
from tests.support import page_example
from tests.support.cuda_codegen import cuda_codegen, on_cuda
from tests.support.form_table import FORMS
from tests.support.forms import addend_bias, linear, make_inputs
from tests.support.programs import run_python

_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Elements of a page; fails where a tag is not closed, or in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    @property
    def text(self) -> str:
        return " ".join(part for parts in self.texts.values() for part in parts)

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


@pytest.fixture(scope="module")
def report() -> gatefuse.Report:
    torch._dynamo.reset()
    return page_example.report()


@pytest.fixture(scope="module")
def path(report: gatefuse.Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.save_page(tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text())


# --- what it says -------------------------------------------------------------------------------


def test_it_says_what_the_report_says(report: gatefuse.Report, page: Page) -> None:
    assert report.verdict == "4 of 4 gates fused in 1 graph"
    assert page.texts["h1"] == [report.verdict]
    (site, *_), (near,) = report.sites, [r for r in report.rejections if r.kind == "near miss"]
    assert page.texts["h3"] == [site.location, near.location]
    for said in (site.line, near.line, near.reason, "layers.0-3.mlp.shared_expert_gate"):
        assert said is not None
        assert said in page.text
    assert "one logit per token is needed" in page.text
    assert "1 sigmoid that cannot be a gate" in page.text
    for version in (gatefuse.__version__, torch.__version__, platform.python_version()):
        assert version in page.text


def test_the_drawings_show_the_gate(report: gatefuse.Report, page: Page) -> None:
    before, after = report.sites[0].before, report.sites[0].after
    assert [n.operator for n in after if n.inputs] == ["gatefuse.linear_sigmoid_mul"]
    assert {n.operator for n in after if not n.inputs} == {"input", "weight", "value", "addend"}
    assert [n.operator for n in before if n.inputs] == [
        "aten.permute",
        "aten.mm",
        "aten.sigmoid",
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ]
    assert {n.type for n in before if n.operator == "weight"} == {"bf16[1, 64]"}
    labels = page.texts["text"]
    for label in ("weight", "mm", "sigmoid", "mul", "add", "linear_sigmoid_mul"):
        assert label in labels


def test_the_kernels_have_the_gates_lines_marked(report: gatefuse.Report, page: Page) -> None:
    (graph,) = report.graphs
    assert graph.code is not None
    marked = "\n".join(page.texts["mark"])
    assert "loadu(in_ptr" in marked  # of the weight
    assert "vec_reduce_all" in marked
    assert "exp()" in marked
    assert len(page.texts["mark"]) < len(page.texts["span"]) / 4


def test_a_page_without_anything_compiled() -> None:
    with gatefuse.record() as report:
        pass
    page = Page(gatefuse_page(report))
    assert page.texts["h1"] == ["no gate fused"]
    assert "nothing was compiled in this block" in page.text


def gatefuse_page(report: gatefuse.Report) -> str:
    from gatefuse import page

    return page.html(report.graphs, report.model, report.activity, report.note)


def test_graph_breaks_are_named_without_folders() -> None:
    report = gatefuse.Report()
    report.activity.breaks = {'a call\nfrom user code:\n File "/home/jo/my model/m.py", line 3': 2}
    text = gatefuse_page(report)
    assert "a call" in text
    assert "2 times" in text
    assert "m.py" in text
    assert "/home/jo" not in text


# --- that it is safe and whole ------------------------------------------------------------------


def test_everything_is_escaped() -> None:
    bad = "<script>alert(1)</script>\"'&"
    site = SiteReport(bad, bad, bad, bad, bad, bad, True, True, True, bad, bad, bad, bad, bad)
    site.before = site.after = [DrawnNode(bad, bad, bad), DrawnNode("b", bad, bad, [bad])]
    graph = GraphReport(bad, bad, sites=[site], error=bad, fused=1)
    graph.rejections = [
        RejectionReport(bad, bad, bad, "gate", bad, bad),
        RejectionReport(bad, bad, bad, "near miss", bad, bad),
        RejectionReport(bad, bad, bad, "other", bad, bad),
    ]
    graph.code = f"linear_sigmoid_mul_0 = async_compile.triton('k', '''\n{bad}\n''', x)\n"
    site.placement, graph.code = "kernel", graph.code.replace("_mul_0", "_mul_kernel_0")
    report = gatefuse.Report([graph], bad, gatefuse.records.ModelGates([bad], [], [bad], bad))
    report.activity.breaks = {bad: 1}
    text = gatefuse_page(report)
    assert text.count("&lt;script&gt;") > 20
    assert "script" not in {tag for tag, _ in Page(text).elements}
    assert "<script" not in text


def test_a_models_source_is_escaped(report: gatefuse.Report) -> None:
    x = torch.randn(4, 8)

    def gate(x: Tensor) -> Tensor:
        return torch.sigmoid(x @ x[0]) * 2  # <script>alert("source")</script>

    found = gatefuse.explain(gate, x)
    lines = [r.line for r in found.rejections if r.line]
    assert any("<script>" in line for line in lines)
    assert "<script" not in gatefuse_page(found)


def test_it_loads_nothing(path: Path, page: Page) -> None:
    assert page.values("src") == []
    assert page.values("href")
    for link in page.values("href"):
        assert link.startswith(("#", "data:,"))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "iframe", "img", "object"})
    assert not re.search(r"@import|url\(|\son\w+=", path.read_text())


def test_links_lead_somewhere(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for link in page.values("href"):
        assert link == "data:," or link.removeprefix("#") in ids


def test_drawings_and_code_can_be_read_aloud_and_reached(page: Page) -> None:
    assert {attrs.get("role") for tag, attrs in page.elements if tag == "svg"} == {"img"}
    for what in ("title", "desc"):
        assert all(text.strip() for text in page.texts[what])
    for tag, attrs in page.elements:
        assert tag != "pre" or ("tabindex" in attrs and attrs["aria-label"])
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))


def test_no_file_tells_the_users_folders(report: gatefuse.Report, tmp_path: Path) -> None:
    names = {path.suffix for path in report.save(tmp_path).iterdir()}
    assert names == {".html", ".json", ".py"}
    assert len(list(tmp_path.glob("*.code.py"))) == 1
    folders = [
        str(Path(__file__).parent.parent),
        torch._inductor.runtime.cache_dir_utils.cache_dir(),
    ]
    for path in tmp_path.iterdir():
        for folder in folders:
            assert folder not in path.read_text(), path.name


@pytest.mark.parametrize(
    "text, told",
    [
        ("# File: /home/jo/a b/m.py:12 in f, code: x / y", "# File: m.py:12 in f, code: x / y"),
        ("a\n  # kernel path: /tmp/t_jo/ab/c.py\nb", "a\n  # kernel path: c.py\nb"),
        ('File "/home/jo/a b/m.py", line 3', 'File "m.py", line 3'),
        ("File 'C:\\Users\\jo\\m.py'", "File 'm.py'"),
        ("at /home/jo/m.py:3", "at m.py:3"),
        ("#include <torch/csrc/x.h>", "#include <torch/csrc/x.h>"),
        ("https://pytorch.org/a/b.html", "https://pytorch.org/a/b.html"),
        ("tmp6 / tmp7 // (a/b/c)", "tmp6 / tmp7 // (a/b/c)"),
    ],
)
def test_folders_are_taken_out_of_text(text: str, told: str) -> None:
    assert without_folders(text) == told


# --- what is kept for it ------------------------------------------------------------------------


@pytest.mark.parametrize("form", [f for f in FORMS if f.fused][::6], ids=lambda f: f.id)
def test_each_form_can_be_drawn(form: Any) -> None:
    with gatefuse.fusing() as report, torch.set_grad_enabled(form.grad):
        torch.compile(form.fn)(*form.inputs())
    for site in report.sites:
        for nodes in (site.before, site.after):
            known = set[str]()
            for node in nodes:  # each after those that it reads
                assert set(node.inputs) <= known
                known.add(node.name)
            roles = {role for n in nodes for role in n.operator.split(", ") if not n.inputs}
            assert roles >= {"input", "weight", "value"}
            assert drawing.svg(nodes, "a gate").count("<rect") >= len(nodes)
        assert any(n.name == site.node for n in site.after)


def test_boxes_do_not_overlap() -> None:
    """Every operand at once, and a chain with two branches and a skip."""
    names = ("input", "weight", "bias", "value", "addend")
    op = [DrawnNode(n, n, "") for n in names] + [DrawnNode("op", "op", "", list(names))]
    chain = [
        DrawnNode("x", "input", ""),
        DrawnNode("w", "weight", ""),
        DrawnNode("xf", "convert", "", ["x"]),
        DrawnNode("wf", "convert", "", ["w"]),
        DrawnNode("p", "mul", "", ["xf", "wf"]),
        DrawnNode("s", "sigmoid", "", ["p"]),
        DrawnNode("m", "mul", "", ["s", "p", "x"]),
    ]
    for nodes, boxes in ((op, 6), (chain, 8)):
        text = drawing.svg(nodes, "a gate")
        found = re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"', text)
        places = [tuple(map(int, numbers)) for numbers in found]
        assert len(places) == boxes
        for i, (x, y, width, height) in enumerate(places):
            for other_x, other_y, _, _ in places[:i]:
                assert abs(x - other_x) >= width or abs(y - other_y) >= height


def test_nodes_and_code_survive_json() -> None:
    from dataclasses import asdict

    with gatefuse.fusing() as report, torch.no_grad():
        torch.compile(addend_bias)(*make_inputs(addend_bias))
    (graph,) = report.graphs
    again = graph_from_dict(json.loads(json.dumps(asdict(graph))))
    assert again == graph
    assert again.sites[0].before == graph.sites[0].before != []
    assert "before" not in report.to_dict()["graphs"][0]["sites"][0]


def test_a_cached_graph_has_its_page(tmp_path: Path) -> None:
    """The second process compiles nothing, and says the same."""
    program = """
        import sys, torch, gatefuse
        from tests.support.forms import linear, make_inputs
        with gatefuse.fusing() as report, torch.no_grad():
            torch.compile(linear)(*make_inputs(linear))
        report.save_page(sys.argv[1])
        """
    texts = []
    for name in ("first.html", "second.html"):
        cache = dict(
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), TORCHINDUCTOR_FX_GRAPH_CACHE="1"
        )
        run_python(program, str(tmp_path / name), **cache)
        texts.append(Page((tmp_path / name).read_text()).texts)
    first, second = texts
    assert first["mark"] == second["mark"] != []
    assert first["text"] == second["text"] != []
    assert "Inductor's cache" in " ".join(second["td"])


def test_torchs_own_hook_keeps_working() -> None:
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import run_and_get_code

    before = GraphLowering.save_output_code
    with gatefuse.fusing() as report, torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(linear), *make_inputs(linear))
    assert GraphLowering.save_output_code is before
    assert report.graphs[0].code is not None
    assert without_folders(code) == report.graphs[0].code


def test_a_graph_never_gets_the_code_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    with gatefuse.fusing() as report, torch.no_grad():
        monkeypatch.setattr(GraphLowering, "codegen", out_of_luck)
        with pytest.raises(Exception, match="out of luck"):
            torch.compile(linear)(*make_inputs(linear))
        monkeypatch.undo()
        torch.compile(addend_bias)(*make_inputs(addend_bias))
    assert GraphLowering.save_output_code is None  # as it was
    failed, compiled = report.graphs
    assert failed.code is None
    assert compiled.code is not None


def out_of_luck(*_: Any) -> Any:
    raise ValueError("out of luck")


# --- kernels for a GPU --------------------------------------------------------------------------


def cuda_excerpts(fn: Any, **options: Any) -> list[excerpts.Excerpt]:
    inputs = make_inputs(fn)
    with cuda_codegen() as generated, gatefuse.fusing(**options) as report, torch.no_grad():
        torch.compile(fn)(*map(on_cuda, inputs))
    return excerpts.kernels_of(generated.code.source, report.sites[0])


def test_the_lines_of_a_generated_triton_kernel() -> None:
    (kernel,) = cuda_excerpts(addend_bias, placement="inline")
    assert kernel.language == "Triton"
    marked = [line for i, line in enumerate(kernel.lines) if i in kernel.marked]
    for part in ("tl.load(in_ptr", "tl.sum(", "tl.sigmoid("):
        assert any(part in line for line in marked)
    products = [line for line in marked if re.search(r"= tmp\d+ \* tmp\d+", line)]
    assert len(products) == 2  # of the linear, of the gate
    assert not any("xnumel" in line or "arange" in line for line in marked)


def test_the_op_s_own_kernel() -> None:
    (kernel,) = cuda_excerpts(addend_bias, placement="kernel")
    assert kernel.lines[1].startswith("def linear_sigmoid_mul_kernel(")


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found)
        yield started
        started.close()


@pytest.mark.parametrize("scheme, lightness", [("light", range(240, 256)), ("dark", range(40))])
@pytest.mark.parametrize("width", [360, 1200])
def test_in_chromium(browser: Any, path: Path, width: int, scheme: str, lightness: range) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, loaded = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: loaded.append(request.url))
    tab.goto(path.as_uri())
    for details in tab.locator("summary").all():
        details.click()
    assert tab.locator("details:not([open])").count() == 0
    assert tab.evaluate(
        "() => { const e = document.documentElement; return e.scrollWidth <= e.clientWidth }"
    )
    colour = tab.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert all(int(part) in lightness for part in re.findall(r"\d+", colour)[:3])
    for link in tab.locator("nav a").all():
        link.click()
        target = tab.url.partition("#")[2]
        assert tab.locator(f"#{target} h2").is_visible()
    assert said == []
    assert [url for url in loaded if not url.startswith(("file:", "data:"))] == []
    tab.close()

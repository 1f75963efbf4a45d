"""The report: what it says, what it writes, and that other tools see the dumps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gatefuse
from gatefuse import recording
from tests.support.forms import addend_bias, linear, logit_returned, make_inputs
from tests.support.graphs import op_nodes
from tests.support.programs import run_python


def two_gates(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """One site and one sigmoid that must stay."""
    fused = torch.sigmoid(F.linear(x, w, b)) * v
    return torch.sigmoid(F.linear(x, w) * 2) * fused


@pytest.fixture
def report() -> gatefuse.Report:
    with gatefuse.fusing() as report, torch.no_grad():
        torch.compile(two_gates)(*make_inputs(two_gates))
    return report


def test_to_dict_is_json(report: gatefuse.Report) -> None:
    tree = json.loads(json.dumps(report.to_dict()))
    assert tree["fused"] == 1
    (graph,) = tree["graphs"]
    (site,), (rejection,) = graph["sites"], graph["rejections"]
    assert graph["phase"] == "inference"
    assert graph["from_cache"] is False
    assert (site["rows"], site["H"], site["D"]) == ("5", "64", "64")
    assert (site["has_bias"], site["has_addend"], site["keeps_logit"]) == (True, False, False)
    assert site["placement"] == "inline"
    assert rejection["reason"]


def test_locations_are_lines_of_the_users_source(report: gatefuse.Report) -> None:
    first = two_gates.__code__.co_firstlineno
    (site,), (rejection,) = report.sites, report.rejections
    assert site.location == f"test_report.py:{first + 2}, in two_gates"
    assert rejection.location == f"test_report.py:{first + 3}, in two_gates"


def test_table(report: gatefuse.Report) -> None:
    text = str(report)
    (site,), (rejection,) = report.sites, report.rejections
    for part in (site.location, site.dtype, site.placement, rejection.location, rejection.reason):
        assert part is not None
        assert part in text
    assert "+bias" in text
    assert max(map(len, text.splitlines())) < 200


def test_save(report: gatefuse.Report, tmp_path: Path) -> None:
    folder = report.save(tmp_path / "new" / "folder")
    assert json.loads((folder / "report.json").read_text()) == report.to_dict()
    (before,) = folder.glob("*before*")
    (after,) = folder.glob("*after*")
    assert op_nodes(before.read_text()) == 0
    assert op_nodes(after.read_text()) == 1


def test_symbolic_sizes() -> None:
    x, w, v = make_inputs(linear)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(v, 0)
    with gatefuse.fusing() as report, torch.no_grad():
        torch.compile(linear)(x, w, v)
    (site,) = report.sites
    assert site.rows.startswith("s")
    assert site.H == "64"
    json.dumps(report.to_dict())


def test_record_enables_nothing() -> None:
    with gatefuse.record() as report:
        torch.compile(linear)(*make_inputs(linear))
    assert report.fused == 0
    assert not report.sites


def test_nested_reports_both_fill() -> None:
    with gatefuse.record() as outer, gatefuse.fusing() as inner:
        torch.compile(linear)(*make_inputs(linear))
    assert (outer.fused, inner.fused) == (1, 1)
    assert [s.placement for s in outer.sites] == [s.placement for s in inner.sites] == ["inline"]


def test_phases() -> None:
    with gatefuse.fusing() as report:
        torch.compile(linear)(*make_inputs(linear, grad=True)).sum().backward()
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(linear)(*make_inputs(linear))
    assert [g.phase for g in report.graphs] == ["forward", "backward", "inference"]
    assert [g.fused for g in report.graphs] == [1, 0, 1]


def test_reports_hold_no_graphs() -> None:
    """A report is plain data: it keeps no module, tensor or node alive."""
    import pickle

    with gatefuse.fusing() as report, torch.no_grad():
        torch.compile(logit_returned)(*make_inputs(logit_returned))
    assert pickle.loads(pickle.dumps(report)).to_dict() == report.to_dict()


def test_dump_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEFUSE_DUMP", str(tmp_path))
    with torch.no_grad():
        torch.compile(addend_bias, options=gatefuse.options())(*make_inputs(addend_bias))
    (folder,) = tmp_path.iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert [name.partition(".")[2] for name in names] == [
        "after.py",
        "before.py",
        "code.py",
        "html",
        "json",
    ]
    assert json.loads((folder / "report.json").read_text())["fused"] == 1
    texts = {path.suffixes[0]: path.read_text() for path in folder.glob("*.py")}
    assert op_nodes(texts[".before"]) == 0
    assert op_nodes(texts[".after"]) == 1
    assert "async_compile" in texts[".code"]


def test_depyf_shows_the_graphs(tmp_path: Path) -> None:
    pytest.importorskip("depyf")
    run_python(
        """
        import sys, depyf, torch, gatefuse
        from tests.support.forms import linear, make_inputs
        with depyf.prepare_debug(sys.argv[1]):
            torch.compile(linear, options=gatefuse.options())(*make_inputs(linear))
        """,
        str(tmp_path),
    )
    texts = {path.name: path.read_text() for path in tmp_path.glob("*gatefuse*")}
    before = [text for name, text in texts.items() if "before" in name]
    after = [text for name, text in texts.items() if "after" in name]
    assert [op_nodes(text) for text in before] == [0]
    assert [op_nodes(text) for text in after] == [1]


# --- what is written ----------------------------------------------------------------------------


def saved(tmp_path: Path) -> gatefuse.Report:
    with gatefuse.fusing() as report, torch.no_grad():
        torch.compile(linear)(*make_inputs(linear))
    report.save(tmp_path)
    return report


def test_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = saved(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(before) == 5

    def full(descriptor: int, *args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    report.note = "changed"
    with pytest.raises(OSError, match="no space"):
        report.save(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_files_take_the_place_of_links(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "dump"
    outside.write_text("precious")
    folder.mkdir()
    (folder / "report.json").symlink_to(outside)
    saved(folder)
    assert outside.read_text() == "precious"
    assert not (folder / "report.json").is_symlink()


def test_a_dump_follows_no_link(tmp_path: Path) -> None:
    report = saved(tmp_path / "first")
    outside, dump = tmp_path / "outside", tmp_path / "dump"
    outside.mkdir()
    dump.mkdir()
    (dump / f"{os.getpid()}.{report.graphs[0].name}").symlink_to(outside)
    recording.dump(report.graphs[0], dump)
    assert list(outside.iterdir()) == []


def test_no_file_tells_the_users_folders(tmp_path: Path) -> None:
    saved(tmp_path)
    here = str(Path(__file__).parent)
    for path in tmp_path.iterdir():
        assert here not in path.read_text()
    assert "# File: forms.py:" in next(tmp_path.glob("*.before.py")).read_text()

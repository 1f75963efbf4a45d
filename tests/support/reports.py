"""What a report must say of a row of the table of forms."""

from __future__ import annotations

import re

import gatefuse
from tests.support.form_table import Form
from tests.support.graphs import op_nodes

_LINEARS = r"torch\.ops\.aten\.(mm|addmm|mv|bmm|sum)\."


def check_report(form: Form, report: gatefuse.Report) -> None:
    """The numbers of sites that the form promises, in one forward graph, and a report that agrees
    with the graph's own text."""
    forward = [g for g in report.graphs if g.phase != "backward"]
    assert len(forward) == 1, [g.name for g in report.graphs]
    graph = forward[0]
    assert graph.phase == ("forward" if form.grad else "inference")
    assert graph.fused == len(graph.sites) == form.fused, [r.reason for r in graph.rejections]
    assert sum(s.has_addend for s in graph.sites) == form.addend
    assert sum(s.has_bias for s in graph.sites) == form.bias
    assert sum(s.keeps_logit for s in graph.sites) == form.keeps_logit
    for site in graph.sites:
        assert site.location is not None
        assert site.location.startswith("forms.py:")
    for rejection in report.rejections:
        assert rejection.reason

    assert op_nodes(graph.after) == form.fused
    assert op_nodes(graph.before) == 0
    assert graph.before is not None
    assert graph.after is not None
    # Each sigmoid is a site or a rejection, and of the linears only those of the sites are gone.
    assert graph.before.count("aten.sigmoid.") == form.fused + len(graph.rejections)
    if not form.keeps_logit:
        assert graph.after.count("aten.sigmoid.") == len(graph.rejections)
    linears = [len(re.findall(_LINEARS, text)) for text in (graph.before, graph.after)]
    assert linears[1] == linears[0] - form.fused

    backward = [g for g in report.graphs if g.phase == "backward"]
    assert len(backward) == int(form.grad)
    assert sum(g.fused for g in backward) >= form.backward

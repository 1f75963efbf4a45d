"""Which cases the grids have, and in which order their providers are compiled."""

from __future__ import annotations

from benchmarks import grid
from gatefuse.bench.cases import providers_of


def test_on_the_cpu_each_provider_is_compiled_first_once() -> None:
    providers = providers_of("glue", ("default",), static=True, device="cpu")
    compiled = [(provider.name, provider.draw) for provider in providers if provider.compiled]
    ours, theirs = "gatefuse-auto", "inductor"
    assert compiled == [(theirs, 0), (ours, 0), (ours, 1), (theirs, 1)]


def test_cases_cover_the_grids_once_and_the_most_telling_come_first() -> None:
    measured = [pair for one in grid.GRIDS.values() for pair in grid.measured(one.cases())]
    assert len(measured) == len(set(measured))
    main = grid.GRIDS["main"].cases()
    assert len(main) == len(grid.WORKLOADS) * len(grid.WIDTHS) * len(grid.ROWS)
    assert {case.rows for case in main[:6]} == {(2,)}
    assert grid.module_cases()[0].tokens in grid.MODULE_TUNED_ROWS
    assert grid.module_cases()[-1].mode == "max-autotune"

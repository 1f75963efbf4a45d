"""``python -m tests.mutants``: which guards can go without any test noticing?

First, the graphs of the test suite are recorded, and the pass runs on all of them once per mutant.
A mutant with which it says or does the same on all of them faces the tests that do more than give
the pass a graph. What survives that too needs a test, or a reason in equivalent.toml.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

from tests import conftest  # noqa: F401  sets the environment, before torch is imported

# isort: split
import torch

from tests.mutants.corpus import record
from tests.mutants.engine import first_difference, first_failure, in_children
from tests.mutants.mutations import MODULES, mutants_of

RECORDED = [
    f"tests/test_{name}.py"
    for name in (
        "pass_guards",
        "guards",
        "linear_guards",
        "near_misses",
        "cost_model",
        "metadata",
        "negatives",
        "spellings",
        "node_order",
        "random_draws",
        "writes",
        "fusion_pass",
        "pass_record",
        "matcher",
        "forms",
        "rounding",
        "other_passes",
        "explain",
        "report",
        "backward_graph",
        "backward_guards",
    )
]
"""Files of tests whose graphs are recorded."""

RUN_AGAIN = (
    "tests/test_backward_graph.py",
    "tests/test_backward_guards.py",
    "tests/test_cost_model.py",
    "tests/test_fusion_pass.py",
    "tests/test_linear_guards.py::test_guard[matrix-vector]",
    "tests/test_matcher.py::test_metadata_is_kept",
    "tests/test_metadata.py",
    "tests/test_node_order.py::test_a_body",
    "tests/test_node_order.py::test_stretches",
    "tests/test_pass_guards.py",
    "tests/test_pass_record.py",
    "tests/test_spellings.py::test_an_error_at_one_candidate",
    "tests/test_spellings.py::test_batch_fusion_is_named",
)
"""Of these, tests that do more than give the pass a graph."""

EQUIVALENT = Path(__file__).with_name("equivalent.toml")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose key contains this text")
    parser.add_argument("--again", type=Path, help="of an earlier table those that survived")
    parser.add_argument("--files", nargs="+", default=RECORDED, help="test files to record")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--graphs-only", action="store_true", help="run no tests on survivors")
    parser.add_argument("--out", type=Path, help="write the table here")
    options = parser.parse_args()

    begin = time.monotonic()
    torch.set_num_threads(1)
    mutants = [m for module in MODULES for m in mutants_of(module) if options.only in m.key]
    if options.again:
        earlier = options.again.read_text()
        mutants = [m for m in mutants if f":{m.what} [{m.function}]: SURVIVES" in earlier]
    known = tomllib.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    corpus = record(options.files, () if options.graphs_only else RUN_AGAIN)
    print(f"{len(mutants)} mutants, {len(corpus.entries)} graphs, {len(corpus.passed)} tests")

    verdicts: dict[str, str] = {}
    survivors = []
    compare = functools.partial(first_difference, corpus=corpus)
    for mutant, difference in in_children(compare, mutants, options.jobs):
        if difference is None:
            survivors.append(mutant)
        else:
            verdicts[mutant.key] = f"killed by a graph ({difference})"
    print(f"{len(survivors)} survive the graphs after {time.monotonic() - begin:.0f} s", flush=True)
    if options.out:  # for --again, should the tests be interrupted
        lines = [f"{m.id} [{m.function}]: {verdicts.get(m.key, 'SURVIVES')}" for m in mutants]
        options.out.write_text("\n".join(["# graphs only, no tests yet", *lines, ""]))
    if not options.graphs_only:
        ask = functools.partial(first_failure, corpus=corpus)
        unexplained = [m for m in survivors if m.key not in known]
        for mutant, failure in in_children(ask, unexplained, options.jobs):
            if failure is not None:
                verdicts[mutant.key] = f"killed by a test ({failure})"
                survivors.remove(mutant)
                print(f"{mutant.id}: {failure}", flush=True)
    for mutant in survivors:
        reason = known.get(mutant.key)
        verdicts[mutant.key] = f"equivalent ({reason})" if reason else "SURVIVES"

    lines = [f"{mutant.id} [{mutant.function}]: {verdicts[mutant.key]}" for mutant in mutants]
    counts = Counter(verdict.partition(" (")[0] for verdict in verdicts.values())
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    header = (
        f"# python -m tests.mutants: {len(mutants)} mutants; {summary}.\n"
        f"# torch {torch.__version__}, {datetime.date.today()}; {len(corpus.entries)} graphs of "
        f"{len(corpus.passed)} tests, {time.monotonic() - begin:.0f} s\n"
    )
    if options.out:
        options.out.write_text(header + "\n".join(lines) + "\n")
    print("\n".join(line for line in lines if line.endswith("SURVIVES")))
    print(header)
    stale = known.keys() - verdicts.keys() if not (options.only or options.again) else ()
    for key in stale:
        print(f"equivalent.toml: no such mutant: {key}")
    return int(bool(counts["SURVIVES"] or stale))


if __name__ == "__main__":
    sys.exit(main())

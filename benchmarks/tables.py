"""Results as Markdown tables. A number with † violates a threshold; with ‡ gatefuse left the gate
alone there, because fusing it does not pay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from benchmarks import grid
from benchmarks.grid import NO_GATE
from benchmarks.store import MODULE, Results, Row, matches
from benchmarks.thresholds import Violation, modules_beside_inductor, violations

ProviderKey = tuple[str, str]  # name, mode

EAGER: ProviderKey = ("eager", "-")
ROOFLINE: ProviderKey = ("roofline", "-")
OP: ProviderKey = ("op", "-")
INDUCTOR: ProviderKey = ("inductor", "default")
GATEFUSE: ProviderKey = ("gatefuse-auto", "default")

LABELS: dict[ProviderKey, str] = {
    EAGER: "eager",
    INDUCTOR: "Inductor",
    ("inductor", "max-autotune"): "Inductor, max-autotune",
    ("inductor", "coordinate-descent"): "Inductor, coordinate descent",
    GATEFUSE: "**gatefuse**",
    ("gatefuse-auto", "max-autotune"): "gatefuse, max-autotune",
    ("gatefuse-auto", "coordinate-descent"): "gatefuse, coordinate descent",
    ("gatefuse-inline", "default"): "gatefuse, forced inline",
    ("gatefuse-kernel", "default"): "gatefuse, forced kernel",
    OP: "gatefuse, the op called by itself",
    ROOFLINE: "roofline: `torch.add` / `torch.addcmul`",
}

TITLES = {
    "mul": "`sigmoid(x @ w.T) * v`",
    "add": "`routed + sigmoid(x @ w.T) * v`",
    "glue": "A decoder layer's glue: norm, router, gate, routed add, residual, next norm",
    "glue-alone": "The glue without residual and next norm",
    "glue-add-then-reshape": "The glue, reshaped after the routed add",
    "glue-reshape-then-add": "The glue, reshaped before the routed add",
    "glue-matmuls": "The glue, with the shared expert's matrix products",
    "glue-opaque": "The glue, with an opaque call after the routed add",
}
TITLES |= {t: f"{TITLES[w]}: forward and backward" for t, w in zip(grid.TRAINED, grid.WORKLOADS)}


def markdown(frame: pd.DataFrame, corner: str = "N") -> str:
    """A table of texts; lines without any value are left out. corner: what heads the index."""
    texts = frame.astype(object).where(frame.notna(), "").rename_axis(index=corner)
    texts = texts[(texts != "").any(axis=1)]
    aligned = ("left", *["right"] * len(texts.columns))
    return str(texts.to_markdown(tablefmt="pipe", disable_numparse=True, colalign=aligned))


def number(value: Any) -> str:
    """Three digits."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def spread(row: Any, hot: str = "") -> str:
    """The median, and the 10th and 90th percentile."""
    median, p10, p90 = (number(getattr(row, f"{hot}{q}_us")) for q in ("median", "p10", "p90"))
    return median and f"{median} ({p10}..{p90})"


def ratio(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.3f}"


def select(cases: pd.DataFrame, workload: str, H: int | None = None, **where: str) -> pd.DataFrame:
    """The rows of a workload at a width (None: at all), of static cases on a GPU in bfloat16
    unless ``where`` says otherwise."""
    wanted = {"device": "cuda", "shapes": "static", "dtype": grid.DTYPE, **where}
    wanted |= {"workload": workload} | ({} if H is None else {"H": H})
    return cases[matches(cases, wanted)]


class Tables:
    """Tables of ``results``, in which what violates a threshold is flagged."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.violations: list[Violation] = violations(results)
        self._violated = {
            (v.case, v.provider, v.mode) for v in self.violations if not (v.reported and v.reason)
        }
        self.cases = self._with_texts(results.cases)
        found = sorted(set(results.cases["H"]))
        self.widths = [H for H in grid.WIDTHS if H in found] or found

    def flag(self, case: str, provider: str, mode: str) -> str:
        """`` †`` where the provider violates a threshold, else nothing."""
        return " †" if (case, provider, mode) in self._violated else ""

    def _with_texts(self, cases: pd.DataFrame) -> pd.DataFrame:
        """The rows with what tables show of them, and the line that they are shown in."""
        texts: dict[str, list[str]] = {name: [] for name in ("time", "spread", "hot", "cost", "of")}
        for r in cases.itertuples():
            flag = self.flag(r.case, r.provider, r.mode)
            auto = r.provider == "gatefuse-auto" and not r.workload.endswith(NO_GATE)
            flag += " ‡" if auto and r.fused == 0 else ""
            shown = [number(r.median_us), spread(r), spread(r, "hot_"), number(r.cost_us)]
            if not pd.isna(r.error):
                shown[:3] = ["failed"] * 3
            limit = f" ({r.least_us / r.median_us:.0%})" if r.workload in grid.TRAINED[:2] else ""
            for name, text in zip(texts, [*shown, ratio(r.ratio) + limit]):
                texts[name].append(text and text + (flag if text != "failed" else ""))
        share = cases["least_us"] / cases["median_us"] * 100
        bandwidth = cases["bytes"] / cases["median_us"] / 1e3
        return cases.assign(
            **texts,
            share=["" if pd.isna(x) else f"{x:.0f}" for x in share],
            bandwidth=["" if pd.isna(x) else f"{x:.0f}" for x in bandwidth],
            baseline=cases["baseline_us"].map(number),
            label=[LABELS[key] for key in zip(cases["provider"], cases["mode"])],
        )

    def lines(
        self, rows: pd.DataFrame, column: str, providers: Iterable[ProviderKey] = tuple(LABELS)
    ) -> pd.DataFrame:
        """A line for each provider, a column for each number of rows."""
        table = rows.pivot(index="label", columns="N", values=column)
        return table.reindex([LABELS[p] for p in providers])

    def times(self, workload: str, H: int) -> list[str]:
        return self._by_provider(workload, H, "spread", "µs:")

    def gate_costs(self, workload: str, H: int) -> list[str]:
        return self._by_provider(workload, H, "cost", "cost of the gate, µs:")

    def _by_provider(self, workload: str, H: int, column: str, what: str) -> list[str]:
        title, rows = f"{TITLES[workload]}, H = {H}, {what}", select(self.cases, workload, H)
        return [title, markdown(self.lines(rows, column))] if len(rows) else []

    def alone(self, workload: str, H: int) -> list[str]:
        """The gate alone: hot inputs, bandwidth, and the best known kernel."""
        rows = select(self.cases, workload, H)
        if rows.empty:
            return []
        shown = (INDUCTOR, GATEFUSE, OP, ROOFLINE)
        columns = {"hot": "hot inputs, µs", "bandwidth": "GB/s", "share": "% of the roofline's"}
        parts = []
        for column, what in columns.items():
            lines = self.lines(rows, column, shown[:-1] if column == "share" else shown)
            parts.append(lines.rename(lambda label, what=what: f"{label}: {what}"))
        baseline = self.lines(rows, "baseline", [OP])
        parts.append(baseline.set_axis(["best known kernel (peers.csv), µs"]))
        return [f"{TITLES[workload]}, H = {H}:", markdown(pd.concat(parts))]

    def ratios(self, workload: str, **where: str) -> list[str]:
        """gatefuse over Inductor, in default mode unless told otherwise, a line for each width. Of
        training with the limit over gatefuse: the least bytes at the rate of `torch.add`."""
        where = {"provider": GATEFUSE[0], "mode": GATEFUSE[1]} | where
        rows = select(self.cases, workload, **where)
        if rows.empty:
            return []
        table = rows.sort_values("H").pivot(index="H", columns="N", values="of")
        return [f"{TITLES[workload]}:", markdown(table.rename(lambda H: f"H = {H}"))]

    def beside_sglang(self) -> list[str]:
        """The op beside the best known kernel in one run, with the roofline."""
        parts = []
        for workload, rows in self.results.sglang.groupby("workload"):
            us = rows.pivot(index=["H", "N"], columns="provider", values="median_us")
            us["text"] = [
                " / ".join(map(number, (r.op, r.sglang, r.roofline)))
                + self.flag(f"{workload} H={r.Index[0]} N={r.Index[1]}", "op", "beside sglang")
                for r in us.itertuples()
            ]
            title = f"{TITLES[str(workload)]}: the op / SGLang's kernel / the roofline, µs:"
            table = us["text"].unstack("N").rename(lambda H: f"H = {H}")
            parts += [title, markdown(table)]
        return parts

    def modules(self) -> list[str]:
        heads = ["N", "kernels: Inductor", "gatefuse", "µs: Inductor", "gatefuse", "ratio"]
        heads += ["slowest compile, µs: Inductor", "gatefuse"]
        heads += ["compile, s: Inductor", "gatefuse", "pass, ms", "peak memory, ratio"]
        parts, modules = [], modules_beside_inductor(self.results.modules)
        for mode in grid.MODULE_MODES:
            names, body = [], []
            for key, rows in modules[modules["mode"] == mode].groupby(MODULE):
                if len(rows) != len(grid.MODULE_PROVIDERS):
                    continue
                plain, fused = both = [*rows.sort_values("provider", ascending=False).itertuples()]
                kernels = [number(r.kernels) if pd.isna(r.error) else "failed" for r in both]
                line = [str(key[2]), *kernels, spread(plain), spread(fused)]
                if "failed" not in kernels:
                    flag = self.flag(fused.case, fused.provider, fused.mode)
                    line += [ratio(fused.ratio) + flag, *(number(r.slowest_us) for r in both)]
                    line += [f"{r.compile_s:.1f}" for r in both]
                    line += [number(fused.pass_ms), ratio(fused.peak_bytes / plain.peak_bytes)]
                names.append(f"{key[0]} {key[1]}")
                body.append(line + [""] * (len(heads) - len(line)))
            if body:
                table = pd.DataFrame(body, names, heads)
                parts += [f"Mode {mode}:", markdown(table, "module")]
        return parts

    def host_calls(self) -> list[str]:
        calls = [row for row in self.results.host if row["what"] == "call" and "median_us" in row]
        if not calls:
            return []
        frame = pd.DataFrame(calls)
        frame["text"] = [
            spread(r) + self.flag(f"host {r.workload}", r.provider, r.mode)
            for r in frame.itertuples()
        ]
        frame["label"] = [LABELS[key] for key in zip(frame["provider"], frame["mode"])]
        table = frame.pivot(index="label", columns="workload", values="text")
        table = table.reindex(LABELS.values())[list(dict.fromkeys(frame["workload"]))]
        title = f"Host time per call without CUDA graphs, N = {calls[0]['N']}, H = {calls[0]['H']}"
        return [f"{title}, µs:", markdown(table, "")]

    def compiles(self) -> list[str]:
        body = {}
        for row in self.results.host:
            if row["what"] != "compile":
                continue
            share = f"{row['pass_ms'] / row['median_s'] / 10:.2f}"
            share += self.flag(f"compile {row['workload']}", row["provider"], row["mode"])
            label = f"{row['workload']}, {row['provider']}, {row['cache']} cache"
            body[label] = [number(row["median_s"]), number(row["pass_ms"]), share]
        heads = ["first call, s", "pass, ms", "pass, %"]
        table = pd.DataFrame.from_dict(body, orient="index", columns=heads)
        parts = ["Time of the first call:", markdown(table, "workload, provider")] if body else []
        for row in self.results.host:
            if row["what"] == "import":
                starts = "" if row["initialises_cuda"] else " and does not initialise CUDA"
                took = f"takes {row['median_ms']} ms{starts}."
                parts.append(f"`import gatefuse` after `import torch` {took}")
        return parts

    def cpu(self) -> list[str]:
        parts = []
        rows = self.cases[(self.cases["device"] == "cpu") & self.cases["workload"].isin(TITLES)]
        order = {workload: i for i, workload in enumerate(TITLES)}
        rows = rows.assign(order=rows["workload"].map(order))
        rows = rows.assign(dynamic=rows["shapes"].where(rows["shapes"] != "static", ""))
        for (shapes, dtype, H, _), group in rows.groupby(["dynamic", "dtype", "H", "order"]):
            table = self.lines(group, "spread", (EAGER, INDUCTOR, GATEFUSE))
            ratios = self.lines(group, "of", [GATEFUSE]).set_axis(["gatefuse / Inductor"])
            title = f"{TITLES[group['workload'].iloc[0]]}, H = {H}, {dtype}"
            title += f", {shapes}, µs:" if shapes else ", µs:"
            parts += [title, markdown(pd.concat([table, ratios]))]
        return parts


def provenance(header: Row) -> str:
    """Device, versions and date of a result file in a line."""
    triton = f", Triton {header['triton']}" if header.get("triton") else ""
    device = str(header["device"]).split(",")[0]
    return f"{device}, torch {header['torch']}{triton}, {header['date'][:10]}"

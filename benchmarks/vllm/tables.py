"""Tables of a result file of :mod:`benchmarks.vllm.__main__`, in Markdown."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from benchmarks.tables import markdown, number

BASE, FUSED = "vllm", "plugin"
ALL_REDUCE = re.compile("AllReduce|cross_device_reduce")
HEADINGS = {
    "new_tokens_per_s": "Output tokens per second",
    "busy_us": "Device busy, µs per step",
    "kernel_us": "Sum of the kernels, µs per step",
    "kernels": "Kernels per step",
}


def everything(content: dict[str, Any]) -> str:
    """The tables, which kernels each provider has and ``vllm`` has not or the other way round, and
    what gatefuse logged."""
    parts = [f"{title(content)}, {content['header']['device']}", *tables(content)]
    runs = first_starts(content)
    for (provider, name), row in runs.iterrows():
        changes = changed(row, runs, name)
        if len(changes):
            table = changes.map(lambda x: f"{x:+.4g}").set_axis(["kernels", "µs"], axis=1)
            table = table.rename(lambda kernel: f"`{kernel[:110]}`")
            parts += [
                f"{provider} against {BASE}, {name}: kernels per step, and their time:",
                markdown(table, ""),
            ]
    for provider, engine in content["engines"].items():
        parts += [f"- {provider}: {line}" for line in engine["lines"]]
    return "\n\n".join([*parts, *(f"- failed: {error}" for error in content["errors"])])


def title(content: dict[str, Any]) -> str:
    """Model, layers, version of vLLM."""
    versions = dict.fromkeys(f"vLLM {e['vllm']}" for e in content["engines"].values())
    parts = [content["model"], f"{content['layers']} layers", *versions]
    starts = len({row.get("start", 0) for row in content["rows"]})
    size = content.get("tensor_parallel", 1)
    parts += [f"tensor parallel on {size} GPUs, all-reduces not counted"] * (size > 1)
    return ", ".join(parts + [f"{starts} starts of each engine"] * (starts > 1))


def frame_of(content: dict[str, Any]) -> pd.DataFrame:
    """A row for each provider, workload and start, with what its profile says."""
    rows = [{"start": 0} | (row.get("profile") or {}) | row for row in content["rows"]]
    if content.get("tensor_parallel", 1) > 1:  # an all-reduce waits for the slower rank
        for row in (row for row in rows if "by_name" in row):
            waits = (k["us_per_step"] for k in row["by_name"] if ALL_REDUCE.search(k["name"]))
            row |= {"busy_us": None, "kernel_us": row["kernel_us"] - sum(waits)}
    columns = ["provider", "name", "start", *HEADINGS, "by_name", "spread", "repeats"]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    once = frame["repeats"].fillna(0) < 2  # too few for a throughput
    return frame.assign(**{c: frame[c].mask(once) for c in ("new_tokens_per_s", "spread")})


def first_starts(content: dict[str, Any]) -> pd.DataFrame:
    """By provider and workload: the first start, which was profiled, with the medians of the
    throughput and its spread over all starts."""
    frame = frame_of(content)
    runs = frame.groupby(["provider", "name"], sort=False)
    medians = runs[["new_tokens_per_s", "spread"]].median()
    first = frame.drop_duplicates(["provider", "name"]).set_index(["provider", "name"])
    return first.assign(**{name: medians[name] for name in medians})


def gains_by_start(content: dict[str, Any]) -> pd.Series:
    """Throughput over that of ``vllm`` minus one, by provider, workload and start of both."""
    speeds = frame_of(content).set_index(["provider", "name", "start"])["new_tokens_per_s"]
    base = speeds[speeds.index.get_level_values("provider") == BASE].droplevel("provider")
    gains = speeds / base.reindex(speeds.index.droplevel("provider")).to_numpy() - 1
    return gains.dropna().drop(BASE, level="provider", errors="ignore")


def tables(content: dict[str, Any]) -> list[str]:
    """Throughput, and what a step holds on the device; each against ``vllm``."""
    runs = first_starts(content)
    providers, names = (list(dict.fromkeys(runs.index.get_level_values(i))) for i in (0, 1))

    def shown(texts: pd.Series) -> str:
        return markdown(texts.unstack("name").reindex(index=providers, columns=names), "")

    parts = []
    gains = gains_by_start(content).groupby(["provider", "name"])
    for key, heading in HEADINGS.items():
        values = runs[key]
        if values.isna().all():
            continue
        base = values.groupby("name").transform(lambda of, v=values: v.get((BASE, of.name)))
        gain = values / base - 1
        if key == "new_tokens_per_s":
            gain.update(gains.median())
        others = (runs.index.get_level_values("provider") != BASE) & gain.notna()
        digits = values.map(lambda v: f"{v:.4g}" if v < 1000 else f"{v:.0f}", na_action="ignore")
        texts = digits + gain.map(lambda g: f" ({100 * g:+.1f} %)").where(others, "")
        parts += [f"{heading}:", shown(texts)]
    if gains.size().max() > 1:
        each = gains.agg(lambda of: ", ".join(f"{100 * gain:+.1f} %" for gain in of))
        parts += [f"Throughput against {BASE}, start by start:", shown(each)]
    costs = gate_us(content, runs)
    if costs.notna().any():
        parts += ["The gate's own kernel time, µs per layer:", shown(costs.map(number))]
    if runs["spread"].notna().any():
        repeats = int(frame_of(content)["repeats"].fillna(0).min())
        spreads = runs["spread"].map(lambda s: f"{100 * s:.1f} %", na_action="ignore")
        parts += [
            f"Spread of the throughput, (p90 - p10) / median, of {repeats} or more repeats:",
            shown(spreads),
        ]
    return parts


def changed(row: pd.Series, runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """Kernels that a step has more or less often than one of ``vllm``: how much more often, and how
    much more time they take, in µs."""
    base = runs["by_name"].get((BASE, name))
    if not (isinstance(row["by_name"], list) and isinstance(base, list)):
        return pd.DataFrame(columns=["per_step", "us_per_step"], index=pd.Index([], dtype="str"))
    mine, theirs = (
        pd.DataFrame(x).groupby("name", sort=False).sum() for x in (row["by_name"], base)
    )
    order = list(dict.fromkeys([*theirs.index, *mine.index]))
    more = mine.reindex(order, fill_value=0.0) - theirs.reindex(order, fill_value=0.0)
    return more[more["per_step"].abs() >= 0.5]


def gate_us(content: dict[str, Any], runs: pd.DataFrame) -> pd.Series:
    """What the gate takes on the device, in µs per layer, where kernels run beside each other also.

    In vLLM as it is: the kernels that the plugin's step lacks, other than code that Inductor
    generates. In another provider: those, and what its own kernels take more than the ones they
    replace. Negative where a kernel that also computes the gate is faster than one without.
    """
    costs = {}
    for (provider, name), row in runs.iterrows():
        if (FUSED, name) not in runs.index:
            continue
        us = changed(runs.loc[(FUSED, name)], runs, name)["us_per_step"]
        gone = us[(us < 0) & ~us.index.str.startswith("triton_")]
        if gone.empty or not isinstance(row["by_name"], list):
            continue
        own = changed(row, runs, name)["us_per_step"].sum() if provider != BASE else 0.0
        costs[provider, name] = (own - gone.sum()) / content["layers"]
    index = pd.MultiIndex.from_tuples(list(costs), names=["provider", "name"]) if costs else None
    return pd.Series(list(costs.values()), index, dtype=float)

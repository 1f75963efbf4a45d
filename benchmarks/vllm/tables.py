"""Tables of a result file of :mod:`benchmarks.vllm.__main__`, in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import tables as report

__all__ = ["everything", "tables"]

Row = dict[str, Any]
BASE, FUSED = "vllm", "plugin"
NO_KERNEL = {"per_step": 0.0, "us_per_step": 0.0}


def everything(content: dict[str, Any]) -> str:
    """The tables, which kernels each arm has and ``vllm`` has not or the other way round, and what
    gatefuse logged."""
    arms = by_arm(content)
    parts = [f"{title(content)}, {content['header']['device']}", *tables(content)]
    for arm, rows in arms.items():
        for name, row in rows.items():
            if body := [
                (f"`{kernel[:110]}`", [f"{more:+.4g}", f"{us:+.4g}"])
                for kernel, more, us in changed(row, arms.get(BASE, {}).get(name, {}))
            ]:
                parts += [
                    f"{arm} against {BASE}, {name}: kernels per step, and their time:",
                    report.table(["", "kernels", "µs"], body),
                ]
    for arm, engine in content["engines"].items():
        parts += [f"- {arm}: {line}" for line in engine["lines"]]
    return "\n\n".join([*parts, *(f"- failed: {error}" for error in content["errors"])])


def title(content: dict[str, Any]) -> str:
    """Model, layers, version of vLLM."""
    versions = dict.fromkeys(f"vLLM {e['vllm']}" for e in content["engines"].values())
    parts = [content["model"], f"{content['layers']} layers", *versions]
    starts = len({row.get("start", 0) for row in content["rows"]})
    return ", ".join(parts + [f"{starts} starts of each engine"] * (starts > 1))


def tables(content: dict[str, Any]) -> list[str]:
    """Throughput, and what a step holds on the device; each against ``vllm``."""
    arms = by_arm(content)
    names = list(dict.fromkeys(row["name"] for row in content["rows"]))
    base = arms.get(BASE, {})
    gains = gains_by_start(content)

    def cell(arm: str, name: str, key: str) -> str:
        mine, theirs = (value(rows.get(name, {}), key) for rows in (arms[arm], base))
        if mine is None:
            return ""
        gain = mine / theirs - 1 if theirs else 0.0
        if key == "new_tokens_per_s" and (arm, name) in gains:
            gain = statistics.median(gains[arm, name])
        ratio = f" ({100 * gain:+.1f} %)" if theirs and arm != BASE else ""
        return f"{mine:.4g}{ratio}" if abs(mine) < 1000 else f"{mine:.0f}{ratio}"

    parts = []
    for heading, key in (
        ("Output tokens per second", "new_tokens_per_s"),
        ("Device busy, µs per step", "busy_us"),
        ("Sum of the kernels, µs per step", "kernel_us"),
        ("Kernels per step", "kernels"),
    ):
        body = [(arm, [cell(arm, name, key) for name in names]) for arm in arms]
        if any(any(values) for _, values in body):
            parts += [f"{heading}:", report.table(["", *names], body)]
    body = [
        (
            arm,
            [", ".join(f"{100 * gain:+.1f} %" for gain in gains.get((arm, n), [])) for n in names],
        )
        for arm in arms
        if arm != BASE
    ]
    if any(len(gain) > 1 for gain in gains.values()):
        parts += [f"Throughput against {BASE}, start by start:", report.table(["", *names], body)]
    costs = [
        (arm, [report.number(gate_us(content, arms, arm, name)) for name in names]) for arm in arms
    ]
    if any(any(values) for _, values in costs):
        parts += ["The gate's own kernel time, µs per layer:", report.table(["", *names], costs)]
    spreads = [row["spread"] for row in content["rows"] if "spread" in row]
    if spreads:
        repeats = min(row.get("repeats", 0) for row in content["rows"])
        spread = [
            (arm, [percent(arms[arm].get(name, {}).get("spread")) for name in names])
            for arm in arms
        ]
        parts += [
            f"Spread of the throughput, (p90 - p10) / median, of {repeats} or more repeats:",
            report.table(["", *names], spread),
        ]
    return parts


def by_arm(content: dict[str, Any]) -> dict[str, dict[str, Row]]:
    """Rows by arm and workload: of the first start, with the medians of all starts."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in content["rows"]:
        found.setdefault(row["arm"], {}).setdefault(row["name"], []).append(row)
    return {
        arm: {name: over_starts(rows) for name, rows in by_name.items()}
        for arm, by_name in found.items()
    }


def over_starts(rows: list[Row]) -> Row:
    """The first start's row, with the medians of the throughput and its spread."""
    merged = dict(rows[0])
    for key in ("new_tokens_per_s", "tokens_per_s", "spread"):
        if values := [row[key] for row in rows if key in row]:
            merged[key] = statistics.median(values)
    return merged


def gains_by_start(content: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """By arm and workload: throughput over that of ``vllm`` minus one, at each start of both."""
    speeds = {
        (row["arm"], row["name"], row.get("start", 0)): row["new_tokens_per_s"]
        for row in content["rows"]
        if "new_tokens_per_s" in row
    }
    gains: dict[tuple[str, str], list[float]] = {}
    for (arm, name, number), speed in speeds.items():
        if arm != BASE and (base := speeds.get((BASE, name, number))):
            gains.setdefault((arm, name), []).append(speed / base - 1)
    return gains


def value(row: Row, key: str) -> Any:
    """Of the row or its profile."""
    return row.get(key, (row.get("profile") or {}).get(key))


def percent(share: float | None) -> str:
    """In a table."""
    return "" if share is None else f"{100 * share:.1f} %"


def changed(row: Row, base: Row) -> list[tuple[str, float, float]]:
    """Kernels that a step has more or less often than one of ``base``: how much more often, and
    how much more time they take, in µs."""
    if not (row.get("profile") and base.get("profile")):
        return []
    mine, theirs = (
        {kernel["name"]: kernel for kernel in r["profile"]["by_name"]} for r in (row, base)
    )
    found = []
    for name in {**theirs, **mine}:
        new, old = mine.get(name, NO_KERNEL), theirs.get(name, NO_KERNEL)
        more = new["per_step"] - old["per_step"]
        if abs(more) >= 0.5:
            found.append((name, more, new["us_per_step"] - old["us_per_step"]))
    return found


def gate_us(
    content: dict[str, Any], arms: dict[str, dict[str, Row]], arm: str, name: str
) -> float | None:
    """What the gate takes on the device, in µs per layer, where kernels run beside each other also.

    In vLLM as it is: the kernels that the plugin's step lacks, other than code that Inductor
    generates. In another arm: those, and what its own kernels take more than the ones that they
    replace. Negative where a kernel that also computes the gate is faster than the one without.
    """
    base, fused = (arms.get(a, {}).get(name, {}) for a in (BASE, FUSED))
    gone = [us for kernel, _, us in changed(fused, base) if us < 0 and kernel[:7] != "triton_"]
    if not gone:
        return None
    own = -sum(gone)
    if arm != BASE:
        row = arms[arm].get(name, {})
        if not row.get("profile"):
            return None
        own += sum(us for _, _, us in changed(row, base))
    return float(own / content["layers"])

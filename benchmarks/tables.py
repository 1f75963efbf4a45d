"""Results as Markdown tables. A number with † misses a mark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from benchmarks import grid
from benchmarks.grid import NO_GATE, BlockKey, Key
from benchmarks.store import GATEFUSE, INDUCTOR, LIMIT, OP, ArmKey, Results, Row, peers
from benchmarks.thresholds import Miss, check

Shown = tuple[str, Callable[[Key], str]]  # a line of a table: label, and its cell at a key

ARMS: dict[ArmKey, str] = {
    ("eager", "-"): "eager",
    INDUCTOR: "Inductor",
    ("inductor", "max-autotune"): "Inductor, max-autotune",
    ("inductor", "coordinate-descent"): "Inductor, coordinate descent",
    GATEFUSE: "**gatefuse**",
    ("gatefuse-auto", "max-autotune"): "gatefuse, max-autotune",
    ("gatefuse-auto", "coordinate-descent"): "gatefuse, coordinate descent",
    ("gatefuse-inline", "default"): "gatefuse, forced inline",
    ("gatefuse-kernel", "default"): "gatefuse, forced kernel",
    OP: "gatefuse, the op called by itself",
    LIMIT: "`torch.add` / `torch.addcmul`",
}

CHAINS = {
    "mul": "`sigmoid(x @ w.T) * v`",
    "add": "`routed + sigmoid(x @ w.T) * v`",
    "glue": "A decoder layer's glue: norm, router, gate, routed add, residual, next norm",
    "glue-alone": "The glue without residual and next norm",
    "glue-add-then-reshape": "The glue, reshaped after the routed add",
    "glue-reshape-then-add": "The glue, reshaped before the routed add",
    "glue-matmuls": "The glue, with the shared expert's matrix products",
    "glue-opaque": "The glue, with an opaque call after the routed add",
}


def table(columns: list[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """A Markdown table; lines without any value are left out."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += [
        "| " + " | ".join([label, *values]) + " |"
        for label, values in rows
        if any(value.strip() for value in values)
    ]
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


class Tables:
    """Tables of ``results``, in which what misses a mark is marked."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.misses: list[Miss] = check(results, partial=True)
        self._missed = {(miss.cell, miss.arm) for miss in self.misses}

    def mark(self, cell: Key | BlockKey | str, arm: ArmKey) -> str:
        """`` †`` where ``arm`` misses a mark in ``cell``, else nothing."""
        return " †" if (cell, arm) in self._missed else ""

    def keys(self, chain: str, H: int, **where: str) -> list[Key]:
        """The keys of a chain at a width, by number of rows; ``where`` are other fields."""
        wanted = {"device": "gpu", "shapes": "static", "dtype": grid.DTYPE, **where}
        return sorted(
            key
            for key in self.results.cells
            if (key.chain, key.H) == (chain, H)
            and all(getattr(key, name) == value for name, value in wanted.items())
        )

    def by_rows(self, keys: list[Key], lines: Iterable[Shown], first: str = "N") -> str:
        """One column for each of ``keys``."""
        body = [(label, [cell(key) for key in keys]) for label, cell in lines]
        return table([first, *(str(key.N) for key in keys)], body)

    # Cells of a table, as functions of the key.

    def time(
        self, arm: ArmKey, spread: bool = False, column: str = "median_us"
    ) -> Callable[[Key], str]:
        """µs; with ``spread`` also the 10th and 90th percentile."""

        def cell(key: Key) -> str:
            row = self.results.cells.get(key, {}).get(arm, {})
            if "error" in row:
                return "failed"
            text = number(row.get(column))
            if text and spread:
                p10, p90 = (number(row[column.replace("median", p)]) for p in ("p10", "p90"))
                text += f" ({p10}..{p90})"
            return text and text + self.mark(key, arm)

        return cell

    def ratio(self, ours: ArmKey, theirs: ArmKey) -> Callable[[Key], str]:
        def cell(key: Key) -> str:
            a, b = (self.results.time(key, arm) for arm in (ours, theirs))
            return "" if a is None or b is None else f"{a / b:.3f}{self.mark(key, ours)}"

        return cell

    def cost(self, arm: ArmKey) -> Callable[[Key], str]:
        """What the gate costs in the glue."""

        def cell(key: Key) -> str:
            text = number(self.results.gate_cost(key, arm))
            return text and text + self.mark(key, arm)

        return cell

    def share(self, arm: ArmKey) -> Callable[[Key], str]:
        """Of the bandwidth of the limit in the same run, in percent."""

        def cell(key: Key) -> str:
            us, limit = self.results.time(key, arm), self.results.time(key, LIMIT)
            return "" if us is None or limit is None else f"{limit / us * 100:.0f}"

        return cell

    def bandwidth(self, arm: ArmKey) -> Callable[[Key], str]:
        """GB/s."""

        def cell(key: Key) -> str:
            us = self.results.time(key, arm)
            moved = self.results.cells.get(key, {}).get(arm, {}).get("bytes")
            return "" if us is None or moved is None else f"{moved / us / 1e3:.0f}"

        return cell

    # Groups of tables.

    def times(self, chain: str, H: int, spread: bool = False, **where: str) -> list[str]:
        """µs of every arm."""
        keys = self.keys(chain, H, **where)
        lines = [(label, self.time(arm, spread)) for arm, label in ARMS.items()]
        return [f"{CHAINS[chain]}, H = {H}, µs:", self.by_rows(keys, lines)] if keys else []

    def alone(self, chain: str, H: int) -> list[str]:
        """The gate alone: hot inputs, bandwidth, and the best known kernel."""
        keys = self.keys(chain, H)
        if not keys:
            return []
        shown = [INDUCTOR, GATEFUSE, OP, LIMIT]
        lines: list[Shown] = [
            (f"{ARMS[arm]}: hot inputs, µs", self.time(arm, True, "hot_median_us")) for arm in shown
        ]
        lines += [(f"{ARMS[arm]}: GB/s", self.bandwidth(arm)) for arm in shown]
        lines += [(f"{ARMS[arm]}: % of the limit's", self.share(arm)) for arm in shown[:-1]]
        lines += [("best known kernel (peers.csv), µs", lambda key: number(peer(key)))]
        return [f"{CHAINS[chain]}, H = {H}:", self.by_rows(keys, lines)]

    def beside_peer(self) -> list[str]:
        """The op beside the best known kernel in one run, with the limit."""
        rivals = self.results.rivals
        parts = []
        for chain in dict.fromkeys(chain for chain, _, _ in sorted(rivals)):
            rows = sorted({N for c, _, N in rivals if c == chain})
            body = []
            for H in sorted({H for c, H, _ in rivals if c == chain}):
                cells = []
                for N in rows:
                    arms = rivals.get((chain, H, N), {})
                    times = [arms.get(a, {}).get("median_us") for a in ("op", "peer", "limit")]
                    mark = self.mark(f"{chain} H={H} N={N}", OP)
                    cells.append(" / ".join(map(number, times)) + mark if all(times) else "")
                body.append((f"H = {H}", cells))
            title = f"{CHAINS[chain]}: the op / SGLang's kernel / the limit, µs:"
            parts += [title, table(["N", *map(str, rows)], body)]
        return parts

    def gate_costs(self, chain: str, H: int, **where: str) -> list[str]:
        """With the gate minus without, of every arm."""
        keys = self.keys(chain, H, **where)
        lines = [(label, self.cost(arm)) for arm, label in ARMS.items()]
        title = f"{CHAINS[chain]}, H = {H}, cost of the gate, µs:"
        return [title, self.by_rows(keys, lines)] if keys else []

    def ratios(self, chain: str, H: int, **where: str) -> list[str]:
        """gatefuse over Inductor in the same mode."""
        keys = self.keys(chain, H, **where)
        lines = [
            (mode, self.ratio(("gatefuse-auto", mode), ("inductor", mode))) for mode in grid.MODES
        ]
        title = f"{CHAINS[chain]}, H = {H}, gatefuse / Inductor:"
        return [title, self.by_rows(keys, lines, "N, mode")] if keys else []

    def by_width(self, chain: str, what: Callable[[Key], str], **where: str) -> str:
        """One line for each width, one column for each number of rows."""
        keys = [k for H in sorted({k.H for k in self.results.cells}) for k in self.keys(chain, H)]
        if where:
            keys = [
                k
                for H in sorted({k.H for k in self.results.cells})
                for k in self.keys(chain, H, **where)
            ]
        rows = sorted({key.N for key in keys})
        body = [
            (
                f"H = {H}",
                [next((what(k) for k in keys if (k.H, k.N) == (H, N)), "") for N in rows],
            )
            for H in sorted({key.H for key in keys})
        ]
        return table(["N", *map(str, rows)], body) if keys else ""

    def blocks(self) -> list[str]:
        """Real modules: kernels and GPU time."""
        parts = []
        for mode in grid.BLOCK_MODES:
            body = []
            for key, arms in sorted(self.results.blocks.items()):
                inductor, fused = arms.get(("inductor", mode)), arms.get(("gatefuse-auto", mode))
                if inductor is None or fused is None:
                    continue
                columns = [str(key.tokens)]
                for row in (inductor, fused):
                    columns.append("failed" if "error" in row else number(row.get("kernels")))
                for row in (inductor, fused):
                    text = number(row.get("median_us"))
                    if text:
                        text += f" ({number(row['p10_us'])}..{number(row['p90_us'])})"
                    columns.append(text)
                if "error" not in inductor and "error" not in fused:
                    ratio = fused["median_us"] / inductor["median_us"]
                    columns.append(f"{ratio:.3f}{self.mark(key, ('gatefuse-auto', mode))}")
                    columns += [number(row.get("slowest_us")) for row in (inductor, fused)]
                    columns += [f"{row['compile_s']:.1f}" for row in (inductor, fused)]
                    columns.append(number(fused["pass_ms"]))
                body.append((f"{key.model} {key.part}", columns))
            if body:
                heads = ["N", "kernels: Inductor", "gatefuse", "µs: Inductor", "gatefuse", "ratio"]
                heads += ["slowest compile, µs: Inductor", "gatefuse"]
                heads += ["compile, s: Inductor", "gatefuse", "pass, ms"]
                width = len(heads)
                padded = [(label, cells + [""] * (width - len(cells))) for label, cells in body]
                parts += [f"Mode {mode}:", table(["module", *heads], padded)]
        return parts

    def host_calls(self, arms: Iterable[ArmKey] = tuple(ARMS)) -> list[str]:
        """Host time per call."""
        calls = [row for row in self.results.host if row["what"] == "call"]
        if not calls:
            return []
        chains = list(dict.fromkeys(row["chain"] for row in calls))
        rows = {(row["chain"], (row["arm"], row["mode"])): row for row in calls}

        def cell(chain: str, arm: ArmKey) -> str:
            row: Row = rows.get((chain, arm), {})
            if "median_us" not in row:
                return ""
            p10, p90 = number(row["p10_us"]), number(row["p90_us"])
            mark = self.mark(f"host {chain}", arm)
            return f"{number(row['median_us'])} ({p10}..{p90}){mark}"

        body = [(ARMS[arm], [cell(chain, arm) for chain in chains]) for arm in arms]
        first = calls[0]
        title = f"Host time per call without CUDA graphs, N = {first['N']}, H = {first['H']}, µs:"
        return [title, table(["", *chains], body)]

    def compiles(self) -> list[str]:
        """Time of the first call and of the pass."""
        rows = [row for row in self.results.host if row["what"] == "compile"]
        body = []
        for row in rows:
            share = f"{row['pass_ms'] / row['median_s'] / 10:.2f}"
            if row["arm"] == "gatefuse-auto":
                share += self.mark(f"compile {row['chain']}", GATEFUSE)
            label = f"{row['chain']}, {row['arm']}, {row['cache']} cache"
            body.append((label, [number(row["median_s"]), number(row["pass_ms"]), share]))
        parts = [
            "Time of the first call:",
            table(["chain, arm", "first call, s", "pass, ms", "pass, %"], body),
        ]
        for row in self.results.host:
            if row["what"] == "import":
                starts = "" if row["initialises_cuda"] else " and does not initialise CUDA"
                parts.append(
                    f"`import gatefuse` after `import torch` takes {row['median_ms']} ms{starts}."
                )
        return parts if rows else []

    def cpu(self) -> list[str]:
        """Times on the CPU, and gatefuse over Inductor."""
        shown = [("eager", "-"), INDUCTOR, GATEFUSE]
        parts = []
        found = {(k.chain, k.H, k.dtype) for k in self.results.cells if k.device == "cpu"}
        for chain, H, dtype in sorted(
            found, key=lambda f: (f[2], f[1], list(CHAINS).index(f[0].removesuffix(NO_GATE)))
        ):
            if chain.endswith(NO_GATE):
                continue
            keys = self.keys(chain, H, device="cpu", dtype=dtype)
            lines: list[Shown] = [(ARMS[arm], self.time(arm, True)) for arm in shown]
            lines.append(("gatefuse / Inductor", self.ratio(GATEFUSE, INDUCTOR)))
            title = f"{CHAINS[chain]}, H = {H}, {dtype}, µs:"
            parts += [title, self.by_rows(keys, lines)]
        return parts

    def all(self) -> Iterator[str]:
        """Everything, for the terminal."""
        for kind, headers in self.results.headers.items():
            for header in headers:
                yield f"{kind}: {provenance(header)}"
        found = sorted(
            {
                (k.shapes, k.dtype, k.chain, k.H)
                for k in self.results.cells
                if k.device == "gpu" and not k.chain.endswith(NO_GATE)
            }
        )
        for shapes, dtype, chain, H in found:
            yield f"## {chain}, H = {H}, {shapes}, {dtype}"
            yield from self.times(chain, H, spread=True, shapes=shapes, dtype=dtype)
            yield from self.ratios(chain, H, shapes=shapes, dtype=dtype)
            if chain in ("mul", "add") and (shapes, dtype) == ("static", grid.DTYPE):
                yield from self.alone(chain, H)
            if chain.startswith("glue"):
                yield from self.gate_costs(chain, H, shapes=shapes, dtype=dtype)
        for part in (
            self.beside_peer(),
            self.cpu(),
            self.blocks(),
            self.host_calls(),
            self.compiles(),
        ):
            yield from part


def peer(key: Key) -> float | None:
    """µs of the best known kernel at ``key``."""
    return peers().get((key.chain, key.H, key.N)) if key.dtype == grid.DTYPE else None


def provenance(header: Row) -> str:
    """Device, versions and date of a result file in a line."""
    triton = f", Triton {header['triton']}" if header.get("triton") else ""
    device = str(header["device"]).split(",")[0]
    return f"{device}, torch {header['torch']}{triton}, {header['date'][:10]}"


def short(results: Results) -> str:
    """What a user wants to know: is gatefuse faster here, and by how much.

    Times in µs. The limit is an elementwise op on the same tensors; the last two columns are what
    the gate costs in the glue.
    """
    tables = Tables(results)
    body = []
    for key in sorted(results.cells):
        ours, theirs = (results.time(key, arm) for arm in (GATEFUSE, INDUCTOR))
        if ours is None or theirs is None or key.chain.endswith(NO_GATE):
            continue
        costs = [number(results.gate_cost(key, arm)) for arm in (INDUCTOR, GATEFUSE)]
        speedup = f"{theirs / ours:.2f}x"
        share = tables.share(GATEFUSE)(key)
        body.append([str(key), number(theirs), number(ours), speedup, share, *costs])
    heads = ["us", "Inductor", "gatefuse", "speed-up", "% of limit"]
    heads += ["gate: Inductor", "gate: gatefuse"]
    parts = [aligned(heads, body)] if body else []
    parts += [*tables.blocks(), *tables.host_calls(), *tables.compiles()]
    return "\n\n".join(part for part in parts if part)


def aligned(heads: list[str], rows: list[list[str]]) -> str:
    """A table for the terminal."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [heads, *rows]
    )

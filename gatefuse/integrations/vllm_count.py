"""Counts fused gates in the code that an engine runs, and tells in one line.

The pass is not called where vLLM or Inductor loads compiled code from a cache. Inductor keeps what
a compilation added to its counters with the compiled code, so the code itself is asked, new or
loaded: vLLM makes one ``PiecewiseBackend`` for each compiled piece of the model, which holds the
compiled code of each range of sizes. A gate counts as fused if it is in all ranges.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections import Counter
from types import ModuleType
from typing import Any

import torch

from gatefuse import report

__all__ = ["fused_in", "install"]

log = logging.getLogger("vllm.gatefuse")

_LEAVES = (str, bytes, int, float, type, type(None), ModuleType, torch.Tensor, torch.nn.Module)

_depth = 0
_made: list[Any] = []
_installed = False


def install() -> None:
    """Follow vLLM's compilations and loads from now on; idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    try:
        from vllm.compilation.backends import VllmBackend
        from vllm.compilation.caching import VllmSerializableFunction
        from vllm.compilation.piecewise_backend import PiecewiseBackend

        _after(PiecewiseBackend, "__init__", _made.append)
        _around(VllmBackend, "__call__")
        load = VllmSerializableFunction.__dict__["deserialize_compile_artifacts"]
        VllmSerializableFunction.deserialize_compile_artifacts = classmethod(
            _telling(load.__func__)
        )
    except Exception as e:
        log.warning("gatefuse: fused gates cannot be counted in this vLLM: %s", e)


def _after(owner: Any, name: str, hook: Any) -> None:
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        hook(self)
        return result

    setattr(owner, name, wrapper)


def _around(owner: Any, name: str) -> None:
    setattr(owner, name, _telling(getattr(owner, name)))


def _telling(plain: Any) -> Any:
    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        global _depth
        _depth += 1
        try:
            result = plain(*args, **kwargs)
        except BaseException:
            _made.clear()
            raise
        finally:
            _depth -= 1
        if _depth == 0:
            made, _made[:] = list(_made), []
            _tell(made)
        return result

    return wrapper


def _tell(made: list[Any]) -> None:
    """Log the line for the pieces of a model that were compiled or loaded just now."""
    from gatefuse.integrations import vllm, vllm_hoist

    if not made:
        return
    config = made[0].vllm_config
    graph_pass = vllm.pass_of(config.compilation_config)
    if graph_pass is None or not graph_pass.hoisted:
        return
    # A model that is compiled again, as after a cache that did not load, counts once.
    model = str(getattr(getattr(made[0], "vllm_backend", None), "prefix", ""))
    this: Counter[str] = Counter()
    for piece in made:
        counts = [fused_in(entry.runnable) for entry in piece.range_entries.values()]
        if counts:
            this.update(min(counts, key=operator.itemgetter("fused")))
    graph_pass.counted[model] = this
    counted: Counter[str] = sum(graph_pass.counted.values(), Counter())
    gates = len(graph_pass.hoisted) + vllm_hoist.left_alone(config.compilation_config)
    names = [name for name in ("inline", "kernel") if counted[name]]
    placement = ", ".join(name if len(names) == 1 else f"{counted[name]} {name}" for name in names)
    first = getattr(config.parallel_config, "rank", 0) == 0
    log.log(
        logging.INFO if first else logging.DEBUG,
        "gatefuse: %d of %d shared-expert gates fused (placement %s)",
        counted["fused"],
        gates,
        placement or "none",
    )
    if counted["fused"] < graph_pass.options.expect:
        raise report.FusionError(
            f"gatefuse: expected at least {graph_pass.options.expect} fused gates in the model, "
            f"fused {counted['fused']}"
        )


def fused_in(runnable: Any) -> Counter[str]:
    """gatefuse's counters of the compiled graph that stands behind a callable.

    The graph is somewhere in wrappers that differ between versions and between new and loaded code;
    of loaded code, the artifact it came from may be there too, with equal counters.
    """
    seen: set[int] = set()
    queue = [runnable]
    found: list[Counter[str]] = [Counter()]
    while queue and len(seen) < 10_000:
        item = queue.pop()
        if id(item) in seen or isinstance(item, _LEAVES):
            continue
        seen.add(id(item))
        state = getattr(item, "__dict__", None)
        if not isinstance(state, dict):
            state = {}
        if (deltas := state.get("counter_deltas")) is not None:
            found.append(Counter({n: deltas.get(key, 0) for n, key in report.COUNTERS.items()}))
        elif isinstance(item, (list, tuple)):
            queue.extend(item)
        elif isinstance(item, dict):
            queue.extend(item.values())
        else:
            queue.extend(state.values())
            queue += [getattr(item, name, None) for name in ("__self__", "func")]
            for cell in getattr(item, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    queue.append(cell.cell_contents)
    return max(found, key=lambda c: c["fused"])

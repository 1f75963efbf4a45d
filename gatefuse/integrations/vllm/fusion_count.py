"""Counts fused gates in the code that an engine runs, and tells in one line when it has started.

The pass is not called where vLLM or Inductor loads compiled code from a cache. Inductor keeps what
a compilation added to its counters with the compiled code, so the code itself is asked, new or
loaded. In mode 3 vLLM makes one ``PiecewiseBackend`` for each compiled piece of the model, which
holds the compiled code of each range of sizes: a gate counts as fused if it is in all ranges. In
mode 2 a model is one compiled function.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from gatefuse import settings
from gatefuse.integrations.vllm import passes
from gatefuse.recording import COUNTERS
from gatefuse.report import FusionError

__all__ = ["fused_in", "install", "note_gate"]

log = logging.getLogger("vllm.gatefuse")

_LEAVES = (str, bytes, int, float, type, type(None), ModuleType, torch.Tensor, torch.nn.Module)

_depth = 0
_made: list[Any] = []
# Of an engine, which is known by the id of its compilation config: by compiled model what is fused,
# and by layer why a gate is left to vLLM, or None.
_counted: dict[int, dict[str, Counter[str]]] = {}
_gates: dict[int, dict[str, str | None]] = {}
_installed = False


def note_gate(compilation_config: Any, layer: str, left: str | None) -> None:
    """A gate is in code that the pass will see, or why it is left to vLLM. The last word counts."""
    _of_engine(_gates, compilation_config)[layer] = left


def _of_engine(table: dict[int, dict[str, Any]], compilation_config: Any) -> dict[str, Any]:
    """An engine's entry, which goes with its config."""
    key = id(compilation_config)
    if key not in table:
        weakref.finalize(compilation_config, table.pop, key, None)
    return table.setdefault(key, {})


def install() -> None:
    """Follow vLLM's compilations, loads and the start of its workers from now on; idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    try:
        from vllm.compilation.backends import VllmBackend
        from vllm.compilation.caching import VllmSerializableFunction
        from vllm.compilation.piecewise_backend import PiecewiseBackend
        from vllm.v1.worker.worker_base import WorkerBase

        load = VllmSerializableFunction.__dict__["deserialize_compile_artifacts"].__func__
        workers = [c for c in _subclasses(WorkerBase) if "compile_or_warm_up_model" in vars(c)]
        _after(PiecewiseBackend, "__init__", _made.append)
        VllmBackend.__call__ = _counting(VllmBackend.__call__)
        VllmSerializableFunction.deserialize_compile_artifacts = classmethod(_counting(load))
        for worker in workers:
            _after(worker, "compile_or_warm_up_model", _tell)
    except Exception as e:
        log.warning("gatefuse: fused gates cannot be counted in this vLLM: %s", e)


def _subclasses(base: Any) -> Iterator[Any]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _after(owner: Any, name: str, hook: Callable[[Any], None]) -> None:
    """Call the hook with the object after a method; once, if the method calls its super's."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        if owner is next(c for c in type(self).__mro__ if name in vars(c)):
            hook(self)
        return result

    setattr(owner, name, wrapper)


def _counting(plain: Any) -> Any:
    """The function that compiles or loads a model; one that calls another one counts once."""

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
            _count(made)
        return result

    return wrapper


def _count(made: list[Any]) -> None:
    """Count the gates of a model in its pieces, which were compiled or loaded just now."""
    if not made:
        return
    # A model that is compiled again, as after a cache that did not load, counts once.
    model = str(getattr(getattr(made[0], "vllm_backend", None), "prefix", ""))
    counted: Counter[str] = Counter()
    for piece in made:
        counts = [fused_in(entry.runnable) for entry in piece.range_entries.values()]
        if counts:
            counted.update(min(counts, key=operator.itemgetter("fused")))
    _of_engine(_counted, made[0].vllm_config.compilation_config)[model] = counted


def _tell(worker: Any) -> None:
    """Log what became of the gates of a worker that has compiled, or loaded, all it runs: a line
    for each reason why some are left to vLLM, and how many are fused if any should be.

    Raises FusionError if ``expect`` is not reached.
    """
    config = worker.vllm_config
    graph_pass = passes.pass_of(config.compilation_config)
    gates = _gates.get(id(config.compilation_config), {})
    in_pieces = _counted.get(id(config.compilation_config), {})
    counted = sum(in_pieces.values() or _of_whole_models(worker), Counter[str]())
    level = logging.INFO if getattr(config.parallel_config, "rank", 0) == 0 else logging.DEBUG
    for reason, number in Counter(filter(None, gates.values())).items():
        log.log(level, "gatefuse: %d shared-expert gates left to vLLM: %s", number, reason)
    if counted["fused"] or None in gates.values():
        names = [name for name in ("inline", "kernel") if counted[name]]
        where = ", ".join(name if len(names) == 1 else f"{counted[name]} {name}" for name in names)
        log.log(
            level,
            "gatefuse: %d of %d shared-expert gates fused (placement %s)",
            counted["fused"],
            max(len(gates), counted["fused"]),
            where or "none",
        )
    options = settings.resolve({}) if graph_pass is None else graph_pass.options
    if counted["fused"] < options.expect:
        raise FusionError(
            f"gatefuse: expected at least {options.expect} fused gates in the engine, "
            f"fused {counted['fused']}"
        )


def _of_whole_models(worker: Any) -> Iterator[Counter[str]]:
    """Of a worker's models, where vLLM compiles each as a whole."""
    runner = worker.model_runner
    drafts = (getattr(runner, name, None) for name in ("drafter", "speculator"))
    for model in (runner.model, *(getattr(draft, "model", None) for draft in drafts)):
        for module in model.modules() if isinstance(model, torch.nn.Module) else ():
            if getattr(module, "do_not_compile", True):  # vLLM's own mark
                continue
            function = getattr(module, "aot_compiled_fn", None)
            # Without ahead-of-time compilation Dynamo keeps compiled graphs in the globals of the
            # code that it replaces.
            variables = type(module).forward.__globals__.items()
            compiled = [v for name, v in variables if name.startswith("__compiled_fn")]
            if counts := [fused_in(f) for f in ([function] if function else compiled)]:
                yield min(counts, key=operator.itemgetter("fused"))


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
            found.append(Counter({n: deltas.get(key, 0) for n, key in COUNTERS.items()}))
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

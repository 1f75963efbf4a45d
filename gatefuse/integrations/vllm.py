"""vLLM: the pass as vLLM takes it, and the plugin that makes ``vllm serve`` use it.

vLLM calls :func:`register` (entry point ``vllm.general_plugins``) in each of its processes. It
changes nothing by itself: when a model with a shared-expert gate is built, the gate is hoisted out
of vLLM's opaque MoE op (:mod:`gatefuse.integrations.vllm_hoist`) and the pass is added to that
engine's compilation config. Models without such a gate, and engines that do not compile with
Inductor, are not touched.

Importing this module imports no vLLM; ``VllmGateFusionPass`` is made when it is first asked for.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatefuse import compat, settings
from gatefuse.fusion_pass import GateFusionPass
from gatefuse.report import COUNTERS
from gatefuse.settings import Options

__all__ = ["add_pass", "make_pass", "pass_of", "register"]

# A child of vLLM's logger, so that vLLM's own set-up of levels and handlers applies.
log = logging.getLogger("vllm.gatefuse")

HOOK = "post_grad_custom_post_pass"


@functools.cache
def _sources_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _pass_class() -> type:
    from vllm.compilation.passes import inductor_pass
    from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass

    class VllmGateFusionPass(GateFusionPass, inductor_pass.InductorPass):
        """:class:`gatefuse.fusion_pass.GateFusionPass` as vLLM's pass manager takes it.

        before: passes that run first, on the same hook. hoisted: layers whose gate stands outside
        the MoE op; part of the id, for code compiled with and without the hoist is not
        interchangeable. ``options.expect`` is checked for the whole engine, not for each piece of
        the graph.
        """

        def __init__(
            self,
            options: Options | None = None,
            before: tuple[Callable[..., Any], ...] = (),
            hoisted: tuple[str, ...] = (),
        ) -> None:
            super().__init__(settings.resolve({}) if options is None else options)
            self.before = before
            self.hoisted = list(hoisted)

        def __reduce__(self) -> Any:
            return make_pass, (self.options, self.before, tuple(self.hoisted))

        def uuid(self) -> str:
            """Identifies sources, options, hoisted layers and the passes in front."""
            plain = GateFusionPass(replace(self.options, expect=0))
            parts = [_sources_hash(), plain.uuid(), f"hoisted={sorted(self.hoisted)}"]
            parts += [
                str(p.uuid()) for p in self.before if isinstance(p, inductor_pass.InductorPass)
            ]
            return " ".join(parts)

        def __call__(self, graph: Any) -> None:
            from torch._dynamo.utils import counters

            context = inductor_pass._pass_context
            for graph_pass in self.before:
                applies = getattr(graph_pass, "is_applicable_for_range", None)
                if context is None or applies is None or applies(context.compile_range):
                    graph_pass(graph)
            fused = counters["inductor"][COUNTERS["fused"]]
            GateFusionPass(replace(self.options, expect=0))(graph)
            fused = counters["inductor"][COUNTERS["fused"]] - fused
            if fused:
                VllmPatternMatcherPass.match_table["gatefuse"] += fused

    VllmGateFusionPass.__qualname__ = "VllmGateFusionPass"
    return VllmGateFusionPass


def make_pass(*state: Any) -> Any:
    """A ``VllmGateFusionPass``; its arguments are those of the class."""
    return _pass_class()(*state)


def __getattr__(name: str) -> Any:
    if name == "VllmGateFusionPass":
        return _pass_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pass_of(compilation_config: Any) -> Any | None:
    """gatefuse's pass in a vLLM compilation config, or None."""
    found = compilation_config.inductor_compile_config.get(HOOK)
    return found if isinstance(found, _pass_class()) else None


def add_pass(compilation_config: Any) -> Any:
    """The pass in a vLLM compilation config; added behind a pass that is there, with the options of
    an explicit gatefuse pass if there is one."""
    config = compilation_config.inductor_compile_config
    existing = config.get(HOOK)
    options, before = None, []
    if type(existing) is _pass_class():
        return existing
    for graph_pass in compat.passes_of(existing):
        if isinstance(graph_pass, GateFusionPass):
            options = graph_pass.options
        else:
            before.append(graph_pass)
    config[HOOK] = make_pass(options, tuple(before))
    return config[HOOK]


_registered = False


def register() -> None:
    """Entry point of the plugin. Idempotent; does nothing with ``GATEFUSE_DISABLE=1``."""
    global _registered
    if _registered or settings.disabled_by_environment():
        return
    _registered = True
    if (reason := compat.unsupported_reason()) is not None:
        log.warning("gatefuse: vLLM is left as it is: %s", reason)
        return
    from gatefuse.integrations import vllm_hoist

    vllm_hoist.install()

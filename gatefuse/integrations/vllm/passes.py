"""The pass as vLLM takes it, and where it is in an engine's configuration.

Importing this module imports no vLLM; the class is made when it is first asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatefuse import settings
from gatefuse.inductor.fusion_pass import GateFusionPass, sources_hash
from gatefuse.inductor.hooks import POST_HOOK, passes_of
from gatefuse.recording import COUNTERS
from gatefuse.settings import Options

__all__ = ["add_pass", "make_pass", "pass_class", "pass_of"]


@functools.cache
def pass_class() -> type:
    """``VllmGateFusionPass``, made when vLLM is there to inherit from."""
    from vllm.compilation.passes import inductor_pass
    from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass

    class VllmGateFusionPass(GateFusionPass, inductor_pass.InductorPass):
        """:class:`gatefuse.inductor.fusion_pass.GateFusionPass` as vLLM's pass manager takes it.

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
            sources = sources_hash(Path(__file__).parent)
            parts = [sources, plain.uuid(), f"hoisted={sorted(self.hoisted)}"]
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
    return pass_class()(*state)


def pass_of(compilation_config: Any) -> Any | None:
    """gatefuse's pass in a vLLM compilation config, or None."""
    found = compilation_config.inductor_compile_config.get(POST_HOOK)
    return found if isinstance(found, pass_class()) else None


def add_pass(compilation_config: Any) -> Any:
    """The pass in a vLLM compilation config; added behind a pass that is there, with the options of
    an explicit gatefuse pass if there is one."""
    config = compilation_config.inductor_compile_config
    existing = config.get(POST_HOOK)
    options, before = None, []
    if type(existing) is pass_class():
        return existing
    for graph_pass in passes_of(existing):
        if isinstance(graph_pass, GateFusionPass):
            options = graph_pass.options
        else:
            before.append(graph_pass)
    config[POST_HOOK] = make_pass(options, tuple(before))
    return config[POST_HOOK]

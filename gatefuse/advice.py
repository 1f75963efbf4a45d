"""What a user can do about a gate that stayed as it was."""

from __future__ import annotations

import re

__all__ = ["advice"]

_ADVICE = (
    (
        r"the linear has (?P<n>.+) outputs, not 1",
        "`Linear(H -> {n})`: one logit per token is needed",
    ),
    (
        r"not a sigmoid, but ",
        "the gate has to be a sigmoid of the logit",
    ),
    (
        r"the logit is computed further|a constant is added to the logit",
        "multiply or shift the weight and the bias instead of the logit",
    ),
    (
        r"is packed for the CPU \(freezing\)",
        "compile without Inductor's `freezing`",
    ),
    (
        r"the logit is an input of the graph|in this graph, which returns it",
        "keep linear, sigmoid and multiply in one graph",
    ),
    (
        r"the product is wider than the value|one gate serves several rows",
        "the gate has to scale whole rows of a value that has the shape of the result",
    ),
    (
        r"the bias differs from row to row|something other than one bias",
        "add one number, or nothing, to the logit",
    ),
    (
        r"perhaps by Inductor's batch fusion",
        "compile without Inductor's batch fusion, or leave the linear of the gate out of it",
    ),
    (
        r"random numbers are drawn more than once",
        "compile the gate in a graph without such draws, or without `fallback_random`",
    ),
    (
        r"memory is written between",
        "move the in-place operation before the linear or after the multiply",
    ),
    (
        r"a forced placement fuses it",
        'nothing: it is faster so; `placement="inline"` fuses it all the same',
    ),
    (
        r"operands are on several devices",
        "move weight, input and value to one device",
    ),
    (
        r"^the .+ is (?:float64|complex|int|bool)",
        "use float16, bfloat16 or float32",
    ),
)


def advice(reason: str) -> str | None:
    """What to change to have a gate fused that was left alone for this reason, where known."""
    for pattern, text in _ADVICE:
        if found := re.search(pattern, reason):
            return text.format(**found.groupdict())
    return None

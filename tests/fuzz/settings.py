"""How a random program is compiled, and of which sizes and dtype it is."""

from __future__ import annotations

import random

from tests.fuzz.programs import Case

__all__ = ["DTYPES", "random_settings"]

DTYPES = ("torch.float32",) * 5 + ("torch.bfloat16",) * 3 + ("torch.float16",)


def random_settings(rng: random.Random, seed: int, index: int) -> tuple[Case, tuple[str, ...], str]:
    """How the program is compiled, the leading dimensions of its rows, its dtype."""

    def chance(probability: float) -> bool:
        return rng.random() < probability

    rank = rng.choice((0, 1, 1, 1, 1, 2, 2, 2, 3, 4))
    lead = tuple(rng.choice(("1", "2", "2", "3")) for _ in range(rank))
    dynamic = rng.choice(("rows", "rows", "all")) if rank and chance(0.2) else ""
    sizes: tuple[int, ...] = (rng.choice((6, 6, 5, 8, 12, 1)),)
    if rank:
        at = rng.randrange(rank)
        lead = (*lead[:at], "n", *lead[at + 1 :])
        if dynamic:
            sizes = (6, rng.choice((4, 10, 8, 14)), rng.choice((2, 1, 20)))
        elif chance(0.04):
            sizes = (0,)
    grad = chance(0.25)
    inductor: dict[str, object] = {}
    gatefuse: dict[str, object] = {}
    if chance(0.5):
        inductor["fallback_random"] = True
    if chance(0.05):
        inductor["emulate_precision_casts"] = True
    if chance(0.2):
        gatefuse["placement"] = rng.choice(("inline", "kernel"))
    if chance(0.07):
        gatefuse["eager_rounding"] = True
    dtype = rng.choice(DTYPES)
    if chance(0.02):
        dtype = "torch.float64"
    inject = rng.randrange(1 << 31) if not grad and not dynamic and chance(0.25) else None
    case = Case(
        seed, index, (), (), (), (), (),
        sizes=sizes,
        grad=grad,
        dynamic=dynamic,
        autocast=chance(0.08),
        checkpoint=grad and chance(0.2),
        coordinate_descent=chance(0.1),
        padded_products=not dynamic and chance(0.05),
        special=chance(0.08) and inject is None,
        inject=inject,
        inductor=inductor,
        gatefuse=gatefuse,
    )  # fmt: skip
    return case, lead, dtype

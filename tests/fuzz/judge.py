"""Compares what a program did with the pass and without."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.fuzz.engines import Compiled, Unusable, run_eagerly
from tests.fuzz.programs import Loaded
from tests.fuzz.rounding import Perturbed
from tests.support.judge import judge

__all__ = ["problems"]

_PERTURBED_RUNS = 4


def problems(loaded: Loaded, compiled: Compiled, strides_of_gradients: bool) -> list[str]:
    """Where the program with the pass is not as without it; none if all is well.

    Shapes, dtypes, strides, memory shared, random numbers and, if nothing was rewritten, every bit
    are those of the program without. Values are within the tolerance of tests.support, and NaN and
    infinities where they are without the pass or in eager PyTorch.
    """
    report, plain, fused = compiled.report, compiled.plain, compiled.fused
    found = [f"error in the pass: {g.error}" for g in report.graphs if g.error]
    found += [
        f"error in the pass: {r.reason}"
        for r in report.rejections
        if r.reason.startswith("could not be rewritten")
    ]
    gradients = [g for graph in report.graphs for g in graph.gradients]
    rewritten = any(g.rewritten for g in gradients)
    found += [
        f"error in the pass: {g.reason}"
        for g in gradients
        if g.reason.startswith("could not be rewritten")
    ]
    if plain.names != fused.names:
        return [*found, f"other results: {plain.names} and {fused.names}"]
    if plain.aliases != fused.aliases:
        found.append(f"memory is shared otherwise: {plain.aliases} and {fused.aliases}")
    assert plain.generator is not None and fused.generator is not None
    if not torch.equal(plain.generator, fused.generator):
        found.append("the random generator is in another state")
    for i, (name, a, b) in enumerate(zip(plain.names, fused.tensors, plain.tensors)):
        if (a is None) != (b is None):
            found.append(f"{name}: {'missing' if a is None else 'not None'}")
        elif a is not None and b is not None:
            problem = _of_form(a, b, strides_of_gradients or "gradient" not in name)
            if problem:
                found.append(f"{name}: {problem}")
            elif not _identical(a, b):
                exact = not a.is_floating_point() or name.split()[-1] in loaded.case.draws
                untouched = not report.fused and not (rewritten and "gradient" in name)
                # On a GPU two compiles of one program differ in the last place: Inductor tunes.
                if exact or (untouched and a.device.type == "cpu"):
                    found.append(f"{name}: {_difference(a, b)}, must be the same bit for bit")
                elif loaded.case.rough.isdisjoint(name.replace(".", " ").split()):
                    found += _of_value(loaded, compiled, i)
    return found


def _of_form(a: Tensor, b: Tensor, strides: bool) -> str | None:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)}, without the pass {b.dtype} {tuple(b.shape)}"
    # Inductor pads products on a GPU, and may return a slice of one where eager returns a whole.
    if a.device.type != "cpu" and a.is_contiguous():
        return None
    if strides and any(p != q for n, p, q in zip(a.shape, a.stride(), b.stride()) if n > 1):
        return f"strides {a.stride()}, without the pass {b.stride()}" if a.numel() else None
    return None


def _identical(a: Tensor, b: Tensor) -> bool:
    # Strides of size 1 are arbitrary, and a view as bytes wants them to be 1.
    a, b = (t.clone(memory_format=torch.contiguous_format).flatten() for t in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _difference(a: Tensor, b: Tensor) -> str:
    return f"differs by {(a.double() - b.double()).abs().max().item():.3e}"


def _of_value(loaded: Loaded, compiled: Compiled, i: int) -> list[str]:
    """Try the tolerance with the error of each of the ways in which the program may be rounded."""
    name = compiled.plain.names[i]
    message = ""
    reference, candidates = _candidates(loaded, compiled, i)
    allowed: list[Tensor] = []
    fused, plain = compiled.fused.tensors[i], compiled.plain.tensors[i]
    assert fused is not None and plain is not None
    working = torch.bfloat16 if loaded.case.autocast else fused.dtype
    for candidate in candidates:
        allowed.append(candidate)
        if not _same_specials(fused, plain, candidate, reference):
            message = f"{name}: NaN or infinity in other places"
            continue
        finite = torch.isfinite(torch.stack([t.double() for t in (fused, reference, *allowed)]))
        keep = finite.all(0)
        errors = torch.stack([(t.double() - reference).where(keep, 0) for t in allowed])
        worst = errors.gather(0, errors.abs().argmax(0, keepdim=True)).squeeze(0)
        ref = reference.where(keep, 0)
        try:
            judge(name, fused.double().where(keep, 0), ref + worst, ref, working, strides=False)
        except AssertionError as e:
            message = str(e)
        else:
            return []
    return [message]


def _candidates(loaded: Loaded, compiled: Compiled, i: int) -> tuple[Tensor, Iterator[Tensor]]:
    """The reference in float64, and results that are right but for their roundings."""
    case, plain = loaded.case, compiled.plain.tensors[i]
    assert plain is not None
    if case.inject is not None and compiled.perturbed is not None:
        # No program says what the graph computes: one run of it is the reference of the others.
        perturbed = compiled.perturbed
        others = (perturbed(k).tensors[i] for k in range(_PERTURBED_RUNS))
        return plain.double(), (t for t in others if t is not None)
    drawn = [compiled.plain.drawn(case, call) for call in range(len(case.sizes))]
    try:
        reference = run_eagerly(loaded, drawn, wide=True).tensors[i]
    except RuntimeError as e:
        # What a conversion copied, a write may change; in float64 nothing is converted.
        if "modified by an inplace operation" not in str(e):
            raise
        raise Unusable(f"in float64: {e}") from e
    assert reference is not None

    def roundings() -> Iterator[Tensor]:
        yield plain
        runs: list[Perturbed | None] = [None, *map(Perturbed, range(_PERTURBED_RUNS))]
        for mode in runs:
            t = run_eagerly(loaded, drawn, mode=mode).tensors[i]
            assert t is not None
            yield t

    return reference.double(), roundings()


def _same_specials(*tensors: Tensor) -> bool:
    """Whether the first is NaN or infinite only where one of the others is so, and if all others
    are."""
    kinds = [t.double().where(~torch.isfinite(t), 0).nan_to_num(3, 1, -1) for t in tensors]
    fused, others = kinds[0], torch.stack(kinds[1:])
    return bool((fused == others).any(0).all())

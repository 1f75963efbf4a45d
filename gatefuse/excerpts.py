"""Finds the kernels of a gate in the module that Inductor generated, and the gate's lines in them.

Inductor names no gate in its kernels' lines. They are found by what they read: from the load of the
gate's weight down to the sum, and from the sigmoid down to the multiply and the add.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gatefuse.records import SiteReport

__all__ = ["Excerpt", "kernels_of"]

_KERNEL = re.compile(
    r"^(?P<comments>(?:#[^\n]*\n)*)"
    r"(?P<name>\w+) = async_compile\.(?P<kind>triton|cpp\w*)\([^\n]*?r?'''\n(?P<source>.*?)^'''",
    re.MULTILINE | re.DOTALL,
)
_OPS_OWN = "linear_sigmoid_mul_kernel"
_NAME = re.compile(r"\b(?:_?tmp\w*|(?:in|out|in_out)_ptr\d+)\b")
_STORE = re.compile(r"tl\.store\((\w+)|\.store\((\w+)|^\s*(\w*out_ptr\d+)\[.*\] = ")
_ASSIGNMENT = re.compile(r"^\s*(?:[\w:<>,]+ )?(\w+) = ")
_SIGMOID = re.compile(r"\bsigmoid\(|\)\(1\)/\(decltype")
_MULTIPLY = re.compile(r"\btmp\w* \* \w*tmp|mul_rn\(")
_SUM = re.compile(r"tl\.sum\(|vec_reduce_all|tmp_acc")
_ADD = re.compile(r"\btmp\w* \+ \w*tmp")


@dataclass
class Excerpt:
    """The source of one kernel. marked: numbers, from 0, of the lines that compute the gate."""

    name: str
    language: str
    lines: list[str]
    marked: set[int] = field(default_factory=set)


@dataclass
class _Kernel:
    name: str
    language: str
    comments: str
    lines: list[str]
    arguments: list[str] = field(default_factory=list)
    """What it is first called with."""


def kernels_of(code: str, site: SiteReport) -> list[Excerpt]:
    """The kernels of one fused gate, in the order of the module; none where they cannot be told
    from those of other gates.

    code: the module that Inductor generated for the graph with the site.
    """
    kernels = [_kernel(found, code) for found in _KERNEL.finditer(code)]
    if site.placement == "kernel":
        own = [k for k in kernels if k.name.startswith(_OPS_OWN)]
        return [Excerpt(k.name, k.language, k.lines) for k in own[:1]]
    weight = next((n.name for n in site.after if "weight" in n.operator), None)
    node = re.compile(rf"^# +%{re.escape(site.node)} : .* = call_function", re.MULTILINE)
    chosen = [k for k in kernels if node.search(k.comments)] or _by_weight(kernels, weight)
    return [Excerpt(k.name, k.language, k.lines, _marked(k, weight, site)) for k in chosen]


def _kernel(found: re.Match[str], code: str) -> _Kernel:
    is_triton = found["kind"] == "triton"
    lines = found["source"].rstrip().splitlines()
    start = "@triton.jit" if is_triton else 'extern "C"'
    first = next((i for i, line in enumerate(lines) if line.startswith(start)), 0)
    call = re.search(rf"^ +(?:\w+\.)?{found['name']}(?:\.run)?\((.*)\)$", code, re.MULTILINE)
    return _Kernel(
        found["name"],
        "Triton" if is_triton else "C++",
        found["comments"],
        lines[first:],
        call[1].split(", ") if call else [],
    )


def _by_weight(kernels: list[_Kernel], weight: str | None) -> list[_Kernel]:
    """The kernel that reads the weight, and those after it up to the gate's sigmoid: C++ has no
    comments that name nodes."""
    chosen = list[_Kernel]()
    for kernel in kernels:
        if "linear_sigmoid_mul" in kernel.name and (chosen or weight in kernel.arguments):
            chosen.append(kernel)
            if any(map(_SIGMOID.search, kernel.lines)):
                break
    return chosen


class _Flow:
    """Which lines of a kernel read what which others write, through memory too."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.sources: list[set[int]] = []
        self.readers: list[set[int]] = [set() for _ in lines]
        written = dict[str, int]()
        for i, line in enumerate(lines):
            target = None
            if found := _STORE.search(line):
                target = found[1] or found[2] or found[3]
            elif found := _ASSIGNMENT.search(line):
                target = found[1]
            read = _NAME.findall(line.partition(" = ")[2] or line)
            self.sources.append({written[name] for name in read if name in written})
            for source in self.sources[-1]:
                self.readers[source].add(i)
            if target is not None:
                written[target] = i

    def down(
        self, start: Iterable[int], last: Callable[[int], object]
    ) -> tuple[set[int], set[int]]:
        """Lines that use what ``start`` computes, up to and with those where it ends: all of them,
        and those where it ends."""
        return self._walk(self.readers, start, last)

    def up(self, start: int, last: Callable[[int], object]) -> set[int]:
        """Lines that make what a line uses, up to and with the ``last`` ones."""
        return self._walk(self.sources, [start], last)[0]

    def _walk(
        self, steps: list[set[int]], start: Iterable[int], last: Callable[[int], object]
    ) -> tuple[set[int], set[int]]:
        seen, ends = set(start), set[int]()
        stack = list(seen)
        while stack:
            for line in steps[stack.pop()] - seen:
                seen.add(line)
                if last(line):
                    ends.add(line)
                else:
                    stack.append(line)
        return seen, ends


def _marked(kernel: _Kernel, weight: str | None, site: SiteReport) -> set[int]:
    lines = kernel.lines
    flow = _Flow(lines)
    signature = lines[: next((i for i, line in enumerate(lines) if ")" in line), 0) + 1]
    parameters = _NAME.findall("\n".join(signature))
    marked = set[int]()
    if weight in kernel.arguments and (at := kernel.arguments.index(weight)) < len(parameters):
        reads = re.compile(rf"\b{parameters[at]}\b")
        loads = [i for i in range(len(signature), len(lines)) if reads.search(lines[i])]
        marked, _ = flow.down(loads, lambda i: _SIGMOID.search(lines[i]))
    sigmoids = [i for i, line in enumerate(lines) if _SIGMOID.search(line)]
    if inside := [i for i in sigmoids if i in marked]:
        sigmoids = inside
        if len(inside) == 1:  # not what the sum is used for besides the gate
            marked &= flow.up(inside[0], lambda _: False)
    if len(sigmoids) != 1:
        return marked
    start, products = flow.down(sigmoids, lambda i: _MULTIPLY.search(lines[i]))
    marked |= start | flow.up(sigmoids[0], lambda i: i in marked or _SUM.search(lines[i]))
    if site.has_addend:
        for product in products:
            result, sums = flow.down([product], lambda i: _ADD.search(lines[i]))
            marked |= {i for i in result if sums and i <= min(sums)}
    return marked

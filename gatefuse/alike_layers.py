"""Layers of a model that are alike: the first of each kind are looked at, and count for all."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gatefuse.origin import layers_as_text
from gatefuse.records import GraphReport, ModelGates

__all__ = ["AlikeLayers", "shorten"]


@dataclass
class AlikeLayers:
    """The layers of one list: those from ``kept`` on are gone, and each is like an earlier one.

    name: the list's in the model. like: for each layer of the whole list, the one that stands for
    it. original: the list as it was.
    """

    name: str
    kept: int
    like: list[int]
    original: list[nn.Module]

    def restore(self, model: nn.Module) -> None:
        """Give the model all of its layers back."""
        layers = model.get_submodule(self.name)
        assert isinstance(layers, nn.ModuleList)
        layers.extend(self.original[self.kept :])

    @property
    def note(self) -> str:
        """What was assumed, for a reader."""
        first = [f"{self.name}.{i}" for i in range(self.kept)]
        rest = [f"{self.name}.{i}" for i in range(self.kept, len(self.like))]
        return (
            f"{layers_as_text(rest)} {'is' if len(rest) == 1 else 'are'} built like "
            f"{layers_as_text(first)}, which alone {'was' if len(first) == 1 else 'were'} scanned"
        )

    def count_all(self, graphs: list[GraphReport], gates: ModelGates) -> ModelGates:
        """Enter the gates and sigmoids of the missing layers into the graphs' reports; returns the
        model's gates with theirs."""
        for graph in graphs:
            for records in (graph.sites, graph.rejections, graph.gradients):
                whole: list[Any] = []
                for record in records:
                    whole += [record, *(self._moved(record, j) for j in self._likes(record.layer))]
                records[:] = whole
            graph.fused = len(graph.sites)
        return replace(
            gates,
            gates=self._all(gates.gates),
            fused=self._all(gates.fused),
            not_compiled=self._all(gates.not_compiled),
        )

    def _likes(self, name: str | None) -> list[int]:
        """The missing layers that are like the one with something of this name."""
        i = self._index(name)
        return (
            [] if i is None else [j for j in range(self.kept, len(self.like)) if self.like[j] == i]
        )

    def _index(self, name: str | None) -> int | None:
        prefix = f"{self.name}."
        if name is None or not name.startswith(prefix):
            return None
        number = re.match(r"\d+(?=[. ]|$)", name.removeprefix(prefix))
        return int(number[0]) if number else None

    def _renamed(self, name: str | None, j: int) -> str | None:
        i = self._index(name)
        if i is None or name is None:
            return name
        return f"{self.name}.{j}" + name.removeprefix(f"{self.name}.{i}")

    def _moved(self, record: Any, j: int) -> Any:
        return replace(record, layer=self._renamed(record.layer, j))

    def _all(self, names: list[str]) -> list[str]:
        copies = [(j, n) for n in names for j in self._likes(n)]
        own = [n for n in names if self._index(n) is not None]
        added = [str(self._renamed(n, j)) for j, n in sorted(copies, key=lambda c: c[0])]
        if not own:
            return names
        end = names.index(own[-1]) + 1
        return names[:end] + added + names[end:]


def shorten(model: Any) -> list[AlikeLayers]:
    """Cut each list of layers after those first ones that have one of each kind, at least two.

    A kind is what a layer is built of: classes, sizes of parameters, and every attribute but the
    layer's own number. Lists within layers, such as experts, are left alone.
    """
    found: list[AlikeLayers] = []
    if not isinstance(model, nn.Module):
        return found
    outermost: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(o) for o in outermost):
            continue
        outermost.append(f"{name}.")
        kinds = _kinds(list(module))
        first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
        kept = max(max(first.values(), default=0) + 1, 2)
        if not name or kept >= len(kinds):
            continue
        last = {kind: i for i, kind in enumerate(kinds[:kept])}
        like = [i if i < kept else last[kind] for i, kind in enumerate(kinds)]
        found.append(AlikeLayers(name, kept, like, list(module)))
    for layers in found:
        whole = model.get_submodule(layers.name)
        assert isinstance(whole, nn.ModuleList)
        del whole[layers.kept :]
    return found


def _kinds(layers: Sequence[nn.Module]) -> list[Hashable]:
    """For each layer what is the same of two that compute the same, whatever their weights."""
    described: list[dict[Any, Any]] = [dict(_parts(layer)) for layer in layers]
    offsets: dict[Hashable, list[int | None]] = {}
    for number, parts in enumerate(described):
        for key, value in parts.items():
            plain = isinstance(value, int) and not isinstance(value, bool)
            offsets.setdefault(key, []).append(value - number if plain else None)
    # A layer's own number is as far from its place in each of the layers.
    numbers = {
        key
        for key, found in offsets.items()
        if len(found) > 1 and len(set(found)) == 1 and found[0] is not None
    }
    return [tuple((k, v) for k, v in d.items() if k not in numbers) for d in described]


def _parts(layer: nn.Module) -> Iterator[tuple[Any, Any]]:
    for name, module in layer.named_modules():
        yield name, type(module)
        for key, value in sorted(module.__dict__.items()):
            if key not in ("_parameters", "_buffers", "_modules"):
                yield (name, key), _value(value)
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            about = None if t is None else (tuple(t.shape), t.dtype, t.requires_grad)
            yield (name, key), about


def _value(value: Any) -> Hashable:
    if isinstance(value, bool | int | str | float | None):
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_value, value))
    if isinstance(value, dict | set):
        return type(value), len(value)
    return type(value), getattr(value, "__qualname__", None)

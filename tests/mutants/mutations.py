"""Mutants: a module with one guard taken out or turned around, made from its syntax tree."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

__all__ = ["INDUCTOR", "MODULES", "Mutant", "mutants_of"]

INDUCTOR = Path(__file__).parents[2] / "gatefuse" / "inductor"
MODULES = (
    "match_gate",
    "match_linear",
    "match_sigmoid",
    "near_misses",
    "node_order",
    "fx_utils",
    "rewriter",
    "cost_model",
    "fusion_pass",
    "match_backward",
    "gradient_rewriter",
)

_STRICTER = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
_SWAPPED = {"bisect_left": "bisect_right", "min": "max"}
_SWAPPED |= {b: a for a, b in _SWAPPED.items()}
_QUIET = ("log", "report")  # whose calls tell and guard nothing

Edit = tuple[ast.AST, str, object]
"""A node of the tree, its field, and what stands there in the mutant."""


@dataclass(frozen=True)
class Mutant:
    """function: its path of names within the module. what: the change, in source text. code: of
    the changed function."""

    module: str
    line: int
    function: str
    what: str
    source: str
    code: CodeType

    @property
    def id(self) -> str:
        return f"{self.module}:{self.line}:{self.what}"

    @property
    def key(self) -> str:
        """Names the mutant wherever its function moves to."""
        return f"{self.module}.{self.function}: {self.what}"


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module of gatefuse.inductor, without those whose code equals another's."""
    text = (INDUCTOR / f"{module}.py").read_text()
    tree = ast.parse(text)
    found: dict[tuple[str, ...], Mutant] = {}
    sources = {ast.unparse(tree)}
    for path, function in _functions(tree, ()):
        for node in _own_nodes(function):
            for what, edits in _changes(node, function, module):
                times = sum(key[:-1] == (*path, what) for key in found)
                name = f"{what} ({times + 1})" if times else what
                mutant = _mutant(module, tree, path, node, name, edits)
                if mutant.source not in sources:
                    sources.add(mutant.source)
                    found[*path, what, name] = mutant
    return list(found.values())


def _mutant(
    module: str,
    tree: ast.Module,
    path: tuple[str, ...],
    node: ast.AST,
    what: str,
    edits: list[Edit],
) -> Mutant:
    before = [(owner, field, getattr(owner, field)) for owner, field, _ in edits]
    for owner, field, new in edits:
        setattr(owner, field, new)
    try:
        changed = ast.fix_missing_locations(copy.deepcopy(tree))
    finally:
        for owner, field, old in before:
            setattr(owner, field, old)
    code = compile(changed, str(INDUCTOR / f"{module}.py"), "exec", dont_inherit=True)
    line = node.iter.lineno if isinstance(node, ast.comprehension) else node.lineno  # type: ignore[attr-defined]
    return Mutant(module, line, ".".join(path), what, ast.unparse(changed), _code_at(code, path))


def _code_at(code: CodeType, path: tuple[str, ...]) -> CodeType:
    for name in path:
        inner = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
        (code,) = inner
    return code


def _functions(
    tree: ast.AST, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    """Functions of the module and methods of its classes, each with its path of names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield (*path, node.name), node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, (*path, node.name))


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function's body; annotations and defaults are not among them."""
    for statement in function.body:
        yield from ast.walk(statement)


def _changes(
    node: ast.AST, function: ast.FunctionDef, module: str
) -> Iterator[tuple[str, list[Edit]]]:
    """What can be done to one node: the change in words, and the edits that make it."""
    if isinstance(node, (ast.If, ast.IfExp)):
        for value in (False, True):
            yield f"{_text(node.test)} -> {value}", [(node, "test", ast.Constant(value))]
    elif isinstance(node, ast.While) and not isinstance(node.test, (ast.Name, ast.Constant)):
        yield f"while {_text(node.test)} -> False", [(node, "test", ast.Constant(False))]
    elif isinstance(node, ast.BoolOp):
        neutral = isinstance(node.op, ast.And)
        for i, clause in enumerate(node.values):
            put = ast.Constant(neutral) if not _names(clause) else _evaluated(clause, neutral)
            values = [*node.values[:i], put, *node.values[i + 1 :]]
            word = "and" if neutral else "or"
            yield f"{word}: without {_text(clause)}", [(node, "values", values)]
    elif isinstance(node, ast.comprehension):
        for i, condition in enumerate(node.ifs):
            rest = node.ifs[:i] + node.ifs[i + 1 :]
            yield f"filter: without {_text(condition)}", [(node, "ifs", rest)]
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _STRICTER:
        other = _STRICTER[type(node.ops[0])]()
        changed = ast.Compare(node.left, [other, *node.ops[1:]], node.comparators)
        yield f"{_text(node)} -> {_text(changed)}", [(node, "ops", changed.ops)]
    elif isinstance(node, ast.Return) and _returns_bool(function) and node.value is not None:
        for value in (False, True):
            if not isinstance(node.value, ast.Constant):
                yield (
                    f"return {_text(node.value)} -> {value}",
                    [(node, "value", ast.Constant(value))],
                )
    elif isinstance(node, ast.ExceptHandler):
        yield "except: raise", [(node, "body", [ast.Raise()])]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if ast.unparse(node.value.func).split(".")[0] not in _QUIET:
            yield f"without {_text(node)}", [(node, "value", ast.Constant(None))]
    elif module == "node_order" and isinstance(node, ast.Call):
        yield from _swapped_call(node)


def _swapped_call(node: ast.Call) -> Iterator[tuple[str, list[Edit]]]:
    function = node.func
    field = "attr" if isinstance(function, ast.Attribute) else "id"
    name = getattr(function, field, "")
    if name in _SWAPPED:
        yield f"{_text(node)} -> {_SWAPPED[name]}", [(function, field, _SWAPPED[name])]


def _names(clause: ast.expr) -> bool:
    return any(isinstance(n, ast.NamedExpr) for n in ast.walk(clause))


def _evaluated(clause: ast.expr, value: bool) -> ast.expr:
    """``(clause, value)[1]``: the clause gives something its name and decides nothing."""
    pair = ast.Tuple([clause, ast.Constant(value)], ast.Load())
    return ast.Subscript(pair, ast.Constant(1), ast.Load())


def _returns_bool(function: ast.FunctionDef) -> bool:
    return isinstance(function.returns, ast.Name) and function.returns.id == "bool"


def _text(node: ast.AST, longest: int = 90) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."

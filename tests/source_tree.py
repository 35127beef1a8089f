"""The package's modules as syntax trees, for the tests of the rules of the layout."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from places import ROOT

PACKAGE = "kedit_lightning"
#: Extras that are optional; nothing else may be imported inside a function.
OPTIONAL = {"av", "bitsandbytes", "gguf", "lm_eval", "sentence_transformers"}


@dataclass(frozen=True)
class Module:
    """A module of the package.

    Args:
        parts: Its name below the package, in parts.
        source: Its text.
        is_package: It is the ``__init__`` of a package.
    """

    parts: tuple[str, ...]
    source: str
    is_package: bool = False

    @property
    def name(self) -> str:
        return ".".join(self.parts)

    @property
    def package(self) -> tuple[str, ...]:
        return self.parts if self.is_package else self.parts[:-1]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Its imports, those for type checking too."""
        inside = {
            id(node)
            for function in ast.walk(self.tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for node in ast.walk(function)
        }
        return tuple(
            Import(name, node.lineno, id(node) in inside)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in self._names(node)
        )

    def _names(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, ...]]:
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
            return
        module = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            above = self.package[: len(self.package) - (node.level - 1)]
            module = (PACKAGE, *above, *module)
        yield from ((*module, alias.name) for alias in node.names)


@dataclass(frozen=True)
class Import:
    """A name that a module imports: all its parts, its line, and whether a function imports it."""

    name: tuple[str, ...]
    line: int
    in_function: bool

    @property
    def below(self) -> tuple[str, ...] | None:
        """Its parts below the package; None for what another package defines."""
        return self.name[1:] if self.name[0] == PACKAGE else None


@cache
def modules() -> tuple[Module, ...]:
    """All modules of the package but its root, which hands out names of every floor, lazily."""
    found = []
    for place, prefix in ((ROOT / "src" / PACKAGE, ()), (ROOT / "callbacks", ("callbacks",))):
        for path in sorted(place.rglob("*.py")):
            parts = (*prefix, *path.relative_to(place).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            parts = parts[:-1] if is_package else parts
            if parts:
                found.append(Module(parts, path.read_text(encoding="utf-8"), is_package))
    return tuple(found)


def planted(**sources: str) -> tuple[Module, ...]:
    """Modules by name, with ``__`` for a dot; a name that ends so is a package's ``__init__``."""
    return tuple(
        Module(tuple(name.removesuffix("__").split("__")), source, name.endswith("__"))
        for name, source in sources.items()
    )


def graph(tree: Iterable[Module]) -> dict[str, set[str]]:
    """Which modules each module imports: a submodule where one is named, else the package."""
    tree = list(tree)
    names = {module.name for module in tree}
    edges: dict[str, set[str]] = {module.name: set() for module in tree}
    for module in tree:
        for imported in module.imports:
            parts = imported.below or ()
            for end in range(len(parts), 0, -1):
                target = ".".join(parts[:end])
                if target in names:
                    if target != module.name:
                        edges[module.name].add(target)
                    break
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            component = sorted(stack[at:])
            del stack[at:]
            if len(component) > 1:
                found.append(component)

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found


def check(violations: Iterable[str]) -> None:
    """Fail with a line for each violation of a rule."""
    lines = list(violations)
    assert not lines, "\n".join(["", *lines])

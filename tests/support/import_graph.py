"""The imports of both packages, read from their syntax trees: nothing is imported to read them."""

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVICE, TRAINER = "dense_reward", "dense_reward_trainer"
SOURCES = {SERVICE: ROOT / "service", TRAINER: ROOT / "trainer"}


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    place: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Import:
    """`function` is the innermost function around it, None at module level; `typing`: under `if TYPE_CHECKING`."""

    name: str
    line: int
    function: str | None = None
    typing: bool = False

    @property
    def library(self) -> str:
        return self.name.partition(".")[0]

    @property
    def late(self) -> bool:
        """Whether this import does not run when its module is imported."""
        return self.typing or self.function is not None


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for package, source in SOURCES.items():
        for file in sorted((source / package).rglob("*.py")):
            parts = file.relative_to(source).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            found.append(Module(name, str(file.relative_to(ROOT)), ast.parse(file.read_text("utf-8"))))
    return tuple(found)


def imports_of(module: Module) -> Iterator[Import]:
    """`from a import b` gives a.b, so that importing a module and a name from it look alike to a prefix check."""
    yield from _imports_below(module, module.tree, None, False)


def _imports_below(module: Module, node: ast.AST, function: str | None, typing: bool) -> Iterator[Import]:
    match node:
        case ast.Import():
            yield from (Import(alias.name, node.lineno, function, typing) for alias in node.names)
        case ast.ImportFrom():
            origin = _origin(module, node)
            yield from (Import(f"{origin}.{alias.name}", node.lineno, function, typing) for alias in node.names)
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            function = name
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            typing = True
    for child in ast.iter_child_nodes(node):
        yield from _imports_below(module, child, function, typing)


def _origin(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    is_package = module.place.endswith("__init__.py")
    parents = module.name.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def within(name: str, parents: Collection[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


@cache
def module_named(name: str) -> Module | None:
    """The module that an imported name is in: the name itself, or the longest part of it that is a module."""
    by_name = {module.name: module for module in modules()}
    parts = name.split(".")
    return next((by_name[n] for n in (".".join(parts[:k]) for k in range(len(parts), 0, -1)) if n in by_name), None)


@cache
def known_to(name: str) -> frozenset[str]:
    """Everything that importing a module imports, transitively: modules of both packages, and names of other libraries.

    Imports inside functions are not counted, nor the `__init__` of a package around a module that is imported.
    """
    known: set[str] = set()
    waiting = [name]
    while waiting:
        module = module_named(waiting.pop())
        for found in imports_of(module) if module is not None else ():
            own = module_named(found.name) if found.library in SOURCES else None
            imported = found.name if own is None else own.name
            if not found.late and imported not in known:
                known.add(imported)
                waiting += [] if own is None else [imported]
    return frozenset(known)


def room_of(name: str) -> str:
    """The room of a module: its folder below the package, or the module itself if it is in no folder."""
    parts = name.split(".")
    folder = SOURCES[parts[0]] / parts[0]
    depth = 1
    while depth < len(parts) and (folder / parts[depth]).is_dir():
        folder /= parts[depth]
        depth += 1
    return ".".join(parts[1 : max(depth, 2)])

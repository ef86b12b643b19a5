"""How the evaluation's modules import each other: without circles, and LLaVA only through its host."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from llava_compodistill import eval as package

ROOT = Path(package.__file__).parent
NAME = package.__name__


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join([NAME, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """What a module imports anywhere, in functions too, but for type checkers alone."""
    found: set[str] = set()
    trees = [ast.parse(path.read_text(encoding="utf-8"))]
    while trees:
        node = trees.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".") + (["__init__"] if path.stem == "__init__" else [])
            base = ".".join([*parts[: -node.level], *filter(None, [node.module])]) if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        trees += ast.iter_child_nodes(node)
    return found


def test_there_is_no_circle():
    known = modules()
    graph = {name: (imported(name, path) & known.keys()) - {name, NAME} for name, path in known.items()}
    assert len(graph) > 20
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_llava_is_reached_through_its_host_alone():
    for name, path in modules().items():
        assert not {other for other in imported(name, path) if other.split(".")[0] == "llava"}, name

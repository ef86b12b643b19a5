"""The rules of the package: what may import what, who patches whom, how long a file may be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once  # nothing here depends on transformers

SOURCE = Path(os.environ.get("COMPODISTILL_SOURCE", Path(__file__).parents[1]))
PACKAGE = SOURCE / "llava_compodistill"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path) for path in FILES}


def imports(path: Path, inside_functions: bool) -> set[tuple[str, ...]]:
    """The modules that a file imports, as absolute names; those under TYPE_CHECKING are not."""
    package = path.relative_to(SOURCE).parent.parts
    found: set[tuple[str, ...]] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
                continue
            if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                found.update(tuple(alias.name.split(".")) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                base += tuple(child.module.split(".")) if child.module else ()
                for alias in child.names:
                    found.add(base + (alias.name,) if base + (alias.name,) in MODULES else base)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def circle_in(graph: dict[tuple[str, ...], set[tuple[str, ...]]]) -> str | None:
    done: set[tuple[str, ...]] = set()

    def visit(name: tuple[str, ...], path: list[tuple[str, ...]]) -> str | None:
        if name in path:
            return " -> ".join(".".join(part[1:]) for part in [*path[path.index(name) :], name])
        if name in done:
            return None
        for target in sorted(graph.get(name, ())):
            found = visit(target, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


def test_no_two_files_import_each_other_in_a_circle():
    """Imports inside functions count."""
    graph = {module_of(path): imports(path, inside_functions=True) & MODULES for path in FILES}
    # A package's __init__ hands out names of its own files; it is no room of its own.
    packages = {module_of(path) for path in FILES if path.name == "__init__.py"}
    graph = {name: targets - packages for name, targets in graph.items() if name not in packages}
    assert circle_in(graph) is None


#: From the bottom up: a room imports from those before it. (`cli` calls all, and is called by none.)
FLOORS = ("ops", "losses", "hosts", "pair", "record", "methods", "train", "eval", "analysis", "reproduce")


def test_rooms_import_downwards():
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0]
        if room not in FLOORS:
            continue
        for name in imports(path, inside_functions=True):
            if name[:1] == ("llava_compodistill",) and len(name) > 1 and name[1] in FLOORS:
                assert FLOORS.index(name[1]) <= FLOORS.index(room), (path, name)


def test_only_the_host_imports_llava():
    for path in FILES:
        names = {name[0] for name in imports(path, inside_functions=True)}
        assert "llava" not in names or "hosts" in path.parts, path


def test_only_record_puts_anything_in_a_forwards_place():
    """Neither by assignment nor by hooks."""
    for path in FILES:
        if PACKAGE / "record" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign):
                targets = [target for target in node.targets if isinstance(target, ast.Attribute)]
                assert not any(target.attr == "forward" for target in targets), (path, node.lineno)
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("register_forward"), (path, node.lineno)


def test_files_stay_short():
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > 420}
    assert not long


def test_the_package_itself_is_light():
    """Importing it needs neither LLaVA, Triton, PyTorch nor a GPU."""
    code = (
        "import sys\n"
        "for name in ('llava', 'triton', 'torch', 'transformers'): sys.modules[name] = None\n"
        "import llava_compodistill, llava_compodistill.errors, llava_compodistill.cli\n"
        "print(llava_compodistill.__version__, len(dir(llava_compodistill)))"
    )
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


def test_about_ten_rooms_at_the_top():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.suffix in ("", ".py")]
    rooms = sorted(path.name for path in entries if path.is_dir())
    assert len(rooms) <= 12, rooms
    assert {path.name for path in entries if path.is_file()} == {"__init__.py", "about.py", "compat.py", "errors.py"}

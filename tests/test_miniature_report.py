"""What a miniature run reports: pictures of every method; and that its modules import one another in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import miniature
from miniature import pictures
from miniature.settings import METHODS

pytestmark = pytest.mark.once
LAYERS = 6


def result(method: str) -> dict:
    """A student's entry of results.json with made-up figures."""
    entries = [{"step": step, "lm": 1 / step, "kl": 2 / step, "attention_similarity": 0.5} for step in (1, 2, 3)]
    stage = "dft" if METHODS[method].distilled else "sft"
    return {
        "method": method,
        "seed": 0,
        "history": {stage: entries},
        "scores": {"similarity_by_layer": [0.5] * LAYERS},
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_drawn(method, tmp_path):
    results = [result("sft"), result(method)]
    for path in (
        pictures.draw_losses(results, tmp_path / "losses.png"),
        pictures.draw_similarity(results, "early", tmp_path / "similarity.png"),
    ):
        assert path.stat().st_size > 5_000


def test_methods_are_told_apart_by_colour():
    colors = [method.color for method in METHODS.values()]
    assert len(set(colors)) == len(colors)


def imports_within(package: Path) -> dict[str, set[str]]:
    """{module: modules of the same folder that it imports, at its top or inside a function}."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in package.glob("*.py")}
    found: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                found[name] |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def test_no_circle_of_imports():
    waiting = imports_within(Path(miniature.__file__).parent)
    assert waiting["report"] >= {"pictures", "evaluate"}  # the reader above sees the imports
    while free := [name for name, imported in waiting.items() if not imported & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"each of these imports another of them: {waiting}"

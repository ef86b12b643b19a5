"""Scenes of the miniature world and how they are drawn.

A scene is a 3x3 grid of cells holding 2 to 4 objects; an object is a colour, a shape, a size and a cell. One cell is
14x14 pixels, the patch of the miniature SigLIP tower, so every cell becomes exactly one visual token. Rows count from
the top and columns from the left, both from 0 in code (the language counts from 1).

All sampling takes a :class:`numpy.random.Generator`; the same state gives the same scene and the same pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw

GRID = 3
CELL = 14
IMAGE_SIZE = GRID * CELL
MIN_OBJECTS, MAX_OBJECTS = 2, 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 180),
    "black": (30, 30, 30),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
SIZES: tuple[str, ...] = ("small", "large")

Pair = tuple[str, str]
"""A (colour, shape) combination, which names an object unambiguously within a scene."""

HELD_OUT: tuple[Pair, ...] = (
    ("red", "star"),
    ("blue", "star"),
    ("blue", "circle"),
)
"""Combinations that no training image or text contains.

They form a chain (each shares its shape or its colour with the next). A chain makes it possible to build test
negatives that replace one unseen combination by another: a text model that merely dislikes unseen combinations then
gains and loses nothing.
"""
SEEN: tuple[Pair, ...] = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT)

# The vision tower's training alone also draws these, and arbitrary colours written "#rrggbb", without a name for them.
# A tower that knows red from stars and stars from red reads a combination it has never seen.
EXTRA_SHAPES: tuple[str, ...] = ("diamond", "bar", "hourglass", "ring")
UNNAMED = -100

# Drawing: object diameters and the largest offset from the cell's centre, in pixels. Objects never leave their cell.
_DIAMETER = {"small": 7.0, "large": 12.0}
_MAX_SHIFT = {"small": 2, "large": 1}
_SUPERSAMPLE = 8
BACKGROUND = 228.0  # mean grey level of the ground


@dataclass(frozen=True, order=True)
class SceneObject:
    row: int
    col: int
    color: str
    shape: str
    size: str

    @property
    def pair(self) -> Pair:
        return (self.color, self.shape)


@dataclass(frozen=True)
class Scene:
    """Objects in distinct cells with distinct (colour, shape) pairs, kept sorted by cell."""

    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.objects))
        object.__setattr__(self, "objects", ordered)
        if len({(o.row, o.col) for o in ordered}) != len(ordered):
            raise ValueError(f"two objects share a cell: {ordered}")
        if len({o.pair for o in ordered}) != len(ordered):
            raise ValueError(f"two objects share colour and shape, so they cannot be named apart: {ordered}")

    @property
    def key(self) -> str:
        """A canonical text for this scene; equal keys mean equal scenes (pixel jitter aside)."""
        return ";".join(f"{o.row}{o.col} {o.size} {o.color} {o.shape}" for o in self.objects)

    def find(self, pair: Pair) -> SceneObject | None:
        return next((o for o in self.objects if o.pair == pair), None)

    def to_list(self) -> list[dict[str, object]]:
        return [{"row": o.row, "col": o.col, "color": o.color, "shape": o.shape, "size": o.size} for o in self.objects]


def pick(rng: np.random.Generator, items: Sequence):
    """One element of ``items``, uniformly (``rng.choice`` is ten times slower and turns strings into numpy ones)."""
    return items[int(rng.integers(len(items)))]


def pick_distinct(rng: np.random.Generator, items: Sequence, count: int) -> list:
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def pick_pairs(rng: np.random.Generator, pairs: Sequence[Pair], count: int, taken: Sequence[Pair] = ()) -> list[Pair]:
    """Up to ``count`` of ``pairs`` in colours that differ from each other's and from those of ``taken``.

    A colour then names one object of a scene, as a noun does in most photographs; with shared colours small models
    need many times the training before they tell objects apart.
    """
    colors = {color for color, _ in taken}
    picked: list[Pair] = []
    for pair in pick_distinct(rng, pairs, len(pairs)):
        if len(picked) == count:
            break
        if pair[0] not in colors:
            colors.add(pair[0])
            picked.append(pair)
    return picked


def place(rng: np.random.Generator, pairs: Sequence[Pair], sizes: Sequence[str | None] | None = None) -> Scene:
    """A scene that holds ``pairs`` in random distinct cells; a size of ``None`` is drawn at random."""
    cells = rng.permutation(GRID * GRID)[: len(pairs)]
    objects = []
    for i, (color, shape) in enumerate(pairs):
        size = (sizes[i] if sizes else None) or pick(rng, SIZES)
        objects.append(SceneObject(int(cells[i]) // GRID, int(cells[i]) % GRID, color, shape, size))
    return Scene(tuple(objects))


def sample_scene(rng: np.random.Generator, pairs: Sequence[Pair] = SEEN) -> Scene:
    """2 to 4 objects from ``pairs`` in distinct colours."""
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    return place(rng, pick_pairs(rng, pairs, count))


# -- drawing ----------------------------------------------------------------------------------------------------------


def _polygon(shape: str, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Corner points of a shape whose extent is about ``2 * radius`` in both directions."""
    x, y = centre
    if shape == "square":
        r = 0.88 * radius
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + 0.85 * radius), (x - radius, y + 0.85 * radius)]
    if shape == "star":
        points = []
        for i in range(10):
            r = 1.1 * radius if i % 2 == 0 else 0.42 * radius
            angle = math.pi * i / 5 - math.pi / 2
            points.append((x + r * math.cos(angle), y + r * math.sin(angle)))
        return points
    if shape == "diamond":
        return [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]
    if shape == "bar":
        r, t = radius, 0.45 * radius
        return [(x - r, y - t), (x + r, y - t), (x + r, y + t), (x - r, y + t)]
    if shape == "hourglass":
        return [(x - radius, y - radius), (x + radius, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
    raise ValueError(f"unknown shape {shape!r}; known: {SHAPES + EXTRA_SHAPES}")


@functools.cache
def _mask(shape: str, size: str, dx: int, dy: int) -> np.ndarray:
    """Anti-aliased coverage of one cell, float32 ``[CELL, CELL, 1]`` in 0…1."""
    big = Image.new("L", (CELL * _SUPERSAMPLE, CELL * _SUPERSAMPLE), 0)
    draw = ImageDraw.Draw(big)
    centre = ((CELL / 2 + dx) * _SUPERSAMPLE, (CELL / 2 + dy) * _SUPERSAMPLE)
    radius = _DIAMETER[size] / 2 * _SUPERSAMPLE
    if shape in ("circle", "ring"):
        draw.ellipse([centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius], fill=255)
        if shape == "ring":
            hole = 0.5 * radius
            draw.ellipse([centre[0] - hole, centre[1] - hole, centre[0] + hole, centre[1] + hole], fill=0)
    else:
        draw.polygon(_polygon(shape, centre, radius), fill=255)
    small = big.resize((CELL, CELL), Image.Resampling.BOX)
    return (np.asarray(small, dtype=np.float32) / 255.0)[..., None]


def render_array(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Pixels of ``scene``, uint8 ``[IMAGE_SIZE, IMAGE_SIZE, 3]``; ``rng`` drives offsets, tints and pixel noise."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = BACKGROUND + rng.uniform(-12, 12, size=3).astype(np.float32)
    for obj in scene.objects:
        shift = _MAX_SHIFT[obj.size]
        dx, dy = (int(v) for v in rng.integers(-shift, shift + 1, size=2))
        rgb = COLORS.get(obj.color) or ImageColor.getrgb(obj.color)
        color = np.asarray(rgb, dtype=np.float32) + rng.uniform(-14, 14, size=3).astype(np.float32)
        mask = _mask(obj.shape, obj.size, dx, dy)
        cell = canvas[obj.row * CELL : (obj.row + 1) * CELL, obj.col * CELL : (obj.col + 1) * CELL]
        cell += mask * (color - cell)
    canvas += 5.0 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as a square RGB image of `IMAGE_SIZE` pixels."""
    return Image.fromarray(render_array(scene, rng))


def cell_labels(scene: Scene) -> np.ndarray:
    """Per-cell class indices, int64 ``[GRID * GRID, 3]``: colour, shape, size, each 0 for an empty cell.

    Colours and shapes without a name get ``UNNAMED``, the label that cross-entropy ignores.
    """
    labels = np.zeros((GRID * GRID, 3), dtype=np.int64)
    names = list(COLORS)
    for o in scene.objects:
        labels[o.row * GRID + o.col] = (
            1 + names.index(o.color) if o.color in COLORS else UNNAMED,
            1 + SHAPES.index(o.shape) if o.shape in SHAPES else UNNAMED,
            1 + SIZES.index(o.size),
        )
    return labels

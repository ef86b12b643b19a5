"""Compositional test items in SugarCrepe's seven types, built so that text alone is worth exactly nothing.

Items come in mirrored couples: a pair of captions (P, Q) is drawn first, without any image; then one scene is drawn in
which P is true and Q false, and another in which Q is true and P false. Both orientations enter the set. Whatever a
model that ignores the image prefers, it is right once and wrong once: its accuracy is exactly 50 %.
"""

from __future__ import annotations

import numpy as np

from .language import KINDS, RELATIONS, Caption, Mention, is_clearly_false, is_true, perturb
from .world import HELD_OUT, MAX_OBJECTS, MIN_OBJECTS, SEEN, SIZES, Pair, Scene, pick, pick_distinct, pick_pairs, place

__all__ = ["KINDS", "caption_pair", "scene_for"]


def _random_caption(kind: str, pairs: list[Pair], rng: np.random.Generator) -> Caption:
    """A caption to which ``perturb(kind)`` can apply, over random objects from ``pairs``."""
    with_relation = kind in ("swap_obj", "replace_rel") or rng.random() < 0.5
    count = 3 if kind == "add_obj" or (not with_relation and rng.random() < 0.5) else 2
    mentions = []
    for color, shape in pick_pairs(rng, pairs, count):
        mentions.append(Mention(color, shape, pick(rng, SIZES) if rng.random() < 0.25 else None))
    return Caption(tuple(mentions), pick(rng, tuple(RELATIONS)) if with_relation else None)


def _unseen_balanced(first: Caption, second: Caption) -> bool:
    """Both captions hold equally many unseen combinations, at least one, in the place that the negative changes."""
    a, b = first.pairs(), second.pairs()
    unseen = set(HELD_OUT)
    if a != b:
        a, b = a - b, b - a
    return len(a & unseen) == len(b & unseen) > 0


def caption_pair(kind: str, rng: np.random.Generator, unseen: bool = False) -> tuple[Caption, Caption]:
    """Two captions of one form that differ in the way of ``kind``; with ``unseen`` they turn on held-out pairs."""
    while True:
        if unseen:
            # Half held-out, half seen: rejection then needs a few dozen draws at most.
            pairs = [*HELD_OUT, *pick_distinct(rng, SEEN, len(HELD_OUT))]
        else:
            pairs = list(SEEN)
        first = _random_caption(kind, pairs, rng)
        if len(first.mentions) < 2 + (kind == "add_obj"):  # too few colours among the drawn pairs
            continue
        second = perturb(first, kind, rng)
        if second is None:
            continue
        if unseen and _unseen_balanced(first, second):
            return first, second
        if not unseen and not (first.pairs() | second.pairs()) & set(HELD_OUT):
            return first, second


def scene_for(true: Caption, false: Caption, rng: np.random.Generator) -> Scene:
    """A random scene where the first caption is true and the second clearly false; bystanders are seen pairs."""
    named = [m.pair for m in true.mentions]
    sizes = [m.size for m in true.mentions]
    others = [p for p in SEEN if p not in named]
    while True:
        count = max(len(named), int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1)))
        extra = pick_pairs(rng, others, count - len(named), taken=named)
        scene = place(rng, named + extra, sizes + [None] * len(extra))
        if is_true(true, scene) and is_clearly_false(false, scene):
            return scene

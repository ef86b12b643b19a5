"""What is said about a scene: captions, questions with short answers, and a few text-only questions.

Objects are named by colour and shape ("red circle"), which is unambiguous because a scene never repeats a combination;
a size may be added. Spatial relations compare the cells' columns or rows and nothing else:

    left of    column(a) < column(b)          above   row(a) < row(b)
    right of   column(a) > column(b)          below   row(a) > row(b)

Rows are counted from the top and columns from the left, from 1. Every generator takes the scene and a
:class:`numpy.random.Generator` and returns only texts that can be derived from the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from .world import COLORS, HELD_OUT, MAX_OBJECTS, SEEN, SHAPES, SIZES, Pair, Scene, SceneObject, pick, pick_distinct

RELATIONS: dict[str, Callable[[SceneObject, SceneObject], bool]] = {
    "left of": lambda a, b: a.col < b.col,
    "right of": lambda a, b: a.col > b.col,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HORIZONTAL, VERTICAL = ("left of", "right of"), ("above", "below")

CAPTION_PROMPT = "Describe the image."
DETAIL_PROMPT = "Describe the image in detail."
# The wording of SugarCrepe's authors, character for character (the space before "(B)" is theirs), so that the
# miniature models are trained on the prompt the benchmark uses.
CHOICE_PROMPT = (
    "Which caption best describes the image?\n(A) {a}\n (B) {b}\n"
    "Answer with the option's alphabet from the given choices directly."
)
MATCH_PROMPT = 'Does this figure show "{caption}"? Please answer yes or no.'


@dataclass(frozen=True)
class Mention:
    """One object as named in a caption."""

    color: str
    shape: str
    size: str | None = None

    @property
    def pair(self) -> Pair:
        return (self.color, self.shape)

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}" if self.size else f"a {self.color} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """``relation`` is None: a list of objects. Otherwise it holds between the first two; a third follows "with"."""

    mentions: tuple[Mention, ...]
    relation: str | None = None

    def __str__(self) -> str:
        first, *rest = self.mentions
        if self.relation is None:
            head = ", ".join(str(m) for m in self.mentions[:-1])
            return f"{head} and {rest[-1]}" if rest else str(first)
        text = f"{first} {self.relation} {rest[0]}"
        return f"{text} with {rest[1]}" if len(rest) > 1 else text

    def pairs(self) -> set[Pair]:
        return {m.pair for m in self.mentions}


def is_true(caption: Caption, scene: Scene) -> bool:
    """Every mentioned object exists (with its size, if given) and the relation holds between the first two."""
    found = [scene.find(m.pair) for m in caption.mentions]
    for mention, obj in zip(caption.mentions, found, strict=True):
        if obj is None or (mention.size is not None and mention.size != obj.size):
            return False
    return caption.relation is None or RELATIONS[caption.relation](found[0], found[1])


def is_clearly_false(caption: Caption, scene: Scene) -> bool:
    """False, and not merely by a tie: "above" is clearly false only of an object that is below.

    Objects are drawn a little off their cell's centre, so two objects of one row may look as if one were higher.
    """
    if is_true(caption, scene):
        return False
    without_relation = replace(caption, relation=None)
    return not is_true(without_relation, scene) or is_true(
        replace(caption, relation=OPPOSITE[caption.relation]), scene
    )


# -- captions ---------------------------------------------------------------------------------------------------------


def _mention(obj: SceneObject, rng: np.random.Generator, size_rate: float) -> Mention:
    return Mention(obj.color, obj.shape, obj.size if rng.random() < size_rate else None)


def related_pair(
    scene: Scene, relations: tuple[str, str], rng: np.random.Generator
) -> tuple[SceneObject, str, SceneObject] | None:
    """Objects a, b and one of two opposite relations that is true of them, all eight ways equally likely, or None."""
    test = RELATIONS[relations[0]]
    candidates = [(a, b) for a, b in itertools.permutations(scene.objects, 2) if test(a, b)]
    if not candidates:
        return None
    a, b = pick(rng, candidates)
    return (a, relations[0], b) if rng.random() < 0.5 else (b, relations[1], a)


def true_caption(
    scene: Scene, rng: np.random.Generator, relation_rate: float = 0.65, size_rate: float = 0.25
) -> Caption:
    """A random true caption: a relation between two objects (sometimes "with" a third) or a list of two or three."""
    if rng.random() < relation_rate:
        axes = [HORIZONTAL, VERTICAL] if rng.random() < 0.5 else [VERTICAL, HORIZONTAL]
        a, relation, b = related_pair(scene, axes[0], rng) or related_pair(scene, axes[1], rng)
        objects = [a, b]
        others = [o for o in scene.objects if o not in objects]
        if others and rng.random() < 0.2:
            objects.append(pick(rng, others))
        return Caption(tuple(_mention(o, rng, size_rate) for o in objects), relation)
    count = min(len(scene.objects), 2 + int(rng.integers(2)))
    return Caption(tuple(_mention(o, rng, size_rate) for o in pick_distinct(rng, scene.objects, count)))


def perturb(caption: Caption, kind: str, rng: np.random.Generator) -> Caption | None:
    """The caption changed in the way of SugarCrepe's ``kind``; None where the change does not apply.

    The result has the same form and number of objects and differs in one place; whether it is false is for the caller
    to check against the scene. The ``add_*`` kinds exchange an addition rather than lengthen the text: "base + true
    addition" against "base + false addition", since length alone would otherwise give the answer away.
    """
    mentions = list(caption.mentions)
    i, j = (int(v) for v in rng.permutation(len(mentions))[:2])
    a, b = mentions[i], mentions[j]
    if kind == "swap_obj":
        if caption.relation is None or len(mentions) < 2:
            return None
        mentions[0], mentions[1] = mentions[1], mentions[0]
    elif kind == "swap_att":
        if a.size and b.size and a.size != b.size and rng.random() < 0.5:
            mentions[i], mentions[j] = replace(a, size=b.size), replace(b, size=a.size)
        elif a.color != b.color and a.shape != b.shape:
            mentions[i], mentions[j] = replace(a, color=b.color), replace(b, color=a.color)
        else:
            return None
    elif kind == "replace_obj":
        mentions[i] = replace(a, shape=pick(rng, [s for s in SHAPES if s != a.shape]))
    elif kind == "replace_att":
        if a.size and rng.random() < 0.5:
            mentions[i] = replace(a, size=SIZES[1 - SIZES.index(a.size)])
        else:
            mentions[i] = replace(a, color=pick(rng, [c for c in COLORS if c != a.color]))
    elif kind == "replace_rel":
        if caption.relation is None:
            return None
        return replace(caption, relation=pick(rng, [r for r in RELATIONS if r != caption.relation]))
    elif kind == "add_obj":
        if len(mentions) < 3:
            return None
        color, shape = pick(rng, [p for p in SEEN + HELD_OUT if p not in caption.pairs()])
        mentions[-1] = replace(mentions[-1], color=color, shape=shape)
    elif kind == "add_att":
        if a.size is None or b.size is not None:
            return None
        mentions[i], mentions[j] = replace(a, size=None), replace(b, size=pick(rng, SIZES))
    else:
        raise ValueError(f"unknown kind {kind!r}")
    changed = Caption(tuple(mentions), caption.relation)
    return changed if len(changed.pairs()) == len(mentions) else None


KINDS = ("swap_obj", "swap_att", "replace_obj", "replace_att", "replace_rel", "add_obj", "add_att")


def false_caption(caption: Caption, scene: Scene, rng: np.random.Generator) -> Caption:
    """A false neighbour of a true caption that uses seen combinations only (safe for training)."""
    while True:
        changed = perturb(caption, pick(rng, KINDS), rng)
        if changed and not changed.pairs() & set(HELD_OUT) and is_clearly_false(changed, scene):
            return changed


# -- questions: each returns (question, answer), or None where the scene does not allow it --------------------------

Round = tuple[str, str]


def _unique(scene: Scene, attribute: str, rng: np.random.Generator) -> SceneObject | None:
    values = [getattr(o, attribute) for o in scene.objects]
    candidates = [o for o in scene.objects if values.count(getattr(o, attribute)) == 1]
    return pick(rng, candidates) if candidates else None


def ask_color(scene: Scene, rng: np.random.Generator) -> Round | None:
    obj = _unique(scene, "shape", rng)
    return obj and (f"What color is the {obj.shape}?", obj.color.capitalize())


def ask_shape(scene: Scene, rng: np.random.Generator) -> Round | None:
    obj = _unique(scene, "color", rng)
    return obj and (f"What shape is the {obj.color} object?", obj.shape.capitalize())


def ask_size(scene: Scene, rng: np.random.Generator) -> Round:
    obj = pick(rng, scene.objects)
    return f"What size is the {obj.color} {obj.shape}?", obj.size.capitalize()


def ask_count(scene: Scene, rng: np.random.Generator) -> Round:
    return "How many objects are there?", str(len(scene.objects))


def ask_row(scene: Scene, rng: np.random.Generator) -> Round:
    obj = pick(rng, scene.objects)
    return f"Which row is the {obj.color} {obj.shape} in?", str(obj.row + 1)


def ask_column(scene: Scene, rng: np.random.Generator) -> Round:
    obj = pick(rng, scene.objects)
    return f"Which column is the {obj.color} {obj.shape} in?", str(obj.col + 1)


def relation_question(a: Pair, relation: str, b: Pair) -> str:
    return f"Is the {' '.join(a)} {relation} the {' '.join(b)}?"


def ask_relation(scene: Scene, rng: np.random.Generator, axis: tuple[str, str] | None = None) -> Round | None:
    """Yes or no with equal chance; "no" always means that the opposite relation holds, never a tie."""
    found = related_pair(scene, axis or pick(rng, (HORIZONTAL, VERTICAL)), rng)
    if found is None:
        return None
    a, relation, b = found
    if rng.random() < 0.5:
        return relation_question(a.pair, relation, b.pair), "Yes"
    return relation_question(a.pair, OPPOSITE[relation], b.pair), "No"


def ask_horizontal(scene: Scene, rng: np.random.Generator) -> Round | None:
    return ask_relation(scene, rng, HORIZONTAL) or ask_relation(scene, rng, VERTICAL)


def ask_vertical(scene: Scene, rng: np.random.Generator) -> Round | None:
    return ask_relation(scene, rng, VERTICAL) or ask_relation(scene, rng, HORIZONTAL)


def ask_side(scene: Scene, rng: np.random.Generator) -> Round | None:
    """Which of two opposite relations holds: two things to compare, where yes or no takes a third, the word asked."""
    axis = pick(rng, (HORIZONTAL, VERTICAL))
    found = related_pair(scene, axis, rng)
    if found is None:
        return None
    a, relation, b = found
    words = "left or right of" if axis is HORIZONTAL else "above or below"
    question = f"Is the {a.color} {a.shape} {words} the {b.color} {b.shape}?"
    return question, relation.split()[0].capitalize()


def ask_detail(scene: Scene, rng: np.random.Generator) -> Round:
    """Every object in reading order with its size and cell: many answer tokens, none of them left to chance."""
    return DETAIL_PROMPT, ", ".join(
        f"a {o.size} {o.color} {o.shape} in row {o.row + 1} column {o.col + 1}" for o in scene.objects
    )


def ask_choice(scene: Scene, rng: np.random.Generator) -> Round:
    right = true_caption(scene, rng)
    wrong = false_caption(right, scene, rng)
    if rng.random() < 0.5:
        return CHOICE_PROMPT.format(a=right, b=wrong), "A"
    return CHOICE_PROMPT.format(a=wrong, b=right), "B"


def ask_match(scene: Scene, rng: np.random.Generator) -> Round:
    caption = true_caption(scene, rng)
    if rng.random() < 0.5:
        return MATCH_PROMPT.format(caption=caption), "Yes"
    return MATCH_PROMPT.format(caption=false_caption(caption, scene, rng)), "No"


def ask_caption(scene: Scene, rng: np.random.Generator) -> Round:
    return CAPTION_PROMPT, str(true_caption(scene, rng))


QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Round | None]] = {
    "caption": ask_caption,
    "color": ask_color,
    "shape": ask_shape,
    "size": ask_size,
    "count": ask_count,
    "horizontal": ask_horizontal,
    "vertical": ask_vertical,
    "side": ask_side,
    "row": ask_row,
    "column": ask_column,
    "choice": ask_choice,
    "match": ask_match,
    "detail": ask_detail,
}


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Round:
    """One round of the given kind; where the scene does not allow it (no unique shape, say) the size is asked."""
    if kind not in QUESTIONS:
        raise ValueError(f"unknown question kind {kind!r}; known: {tuple(QUESTIONS)}")
    return QUESTIONS[kind](scene, rng) or ask_size(scene, rng)


def text_round(rng: np.random.Generator) -> Round:
    """A question that needs no image."""
    which = int(rng.integers(4))
    if which == 0:
        word = pick(rng, (*COLORS, *SHAPES))
        return f"Is {word} a color or a shape?", "Color" if word in COLORS else "Shape"
    if which == 1:
        opposites = {**{a.split()[0]: b.split()[0] for a, b in OPPOSITE.items()}, "small": "large", "large": "small"}
        word = pick(rng, tuple(opposites))
        return f"What is the opposite of {word}?", opposites[word].capitalize()
    if which == 2:
        number = int(rng.integers(1, MAX_OBJECTS))
        return f"Which number is after {number}?", str(number + 1)
    color, shape = pick(rng, SEEN)
    return f"Repeat: a {color} {shape}", f"a {color} {shape}"


def vocabulary() -> list[str]:
    """Every word (lower and upper case forms apart, punctuation stripped) that the world can produce, sorted."""
    texts: list[str] = [CAPTION_PROMPT, DETAIL_PROMPT]
    texts += [CHOICE_PROMPT.format(a="", b=""), MATCH_PROMPT.format(caption="")]
    texts += [*COLORS, *SHAPES, *SIZES, *RELATIONS, "a and with 1 2 3 4 Yes No A B"]
    texts += [w.capitalize() for w in (*COLORS, *SHAPES, *SIZES, "left", "right", "above", "below")]
    texts += ["What color shape size is the object? How many objects are there? Which row column is in?"]
    texts += ["Is a color or a shape? Color Shape What is the opposite of? Which number is after? Repeat:"]
    return sorted(words(texts))


def words(texts: Iterable[str]) -> set[str]:
    return {w for text in texts for raw in text.split() if (w := raw.strip('.,:?"()'))}

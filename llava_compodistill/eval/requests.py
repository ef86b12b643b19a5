"""What can be asked of a model about an image; `engine.Engine` answers it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import DataError
from ..hosts.files import half_a_character
from .marks import Picture


@dataclass(frozen=True)
class Likelihood:
    """How likely is `answer`? Answered by the mean log-probability of its tokens, the end token included, in nats."""

    image: Picture
    prompt: str
    answer: str


@dataclass(frozen=True)
class Continuation:
    """As `Likelihood`; answered by (mean log-probability, whether the answer is what would be decoded greedily)."""

    image: Picture
    prompt: str
    answer: str


@dataclass(frozen=True)
class FirstWord:
    """Which of `words` would an answer begin with? Answered by the log-probability of the first token of each."""

    image: Picture
    prompt: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What does the model answer? Answered by text, decoded greedily.

    Attributes:
        exact: the likeliest token is looked for in float32: at 16 bits the logits of "A" and "B" often tie.
    """

    image: Picture
    prompt: str
    max_new_tokens: int = 64
    exact: bool = False


Request = Likelihood | Continuation | FirstWord | Answer


def check_text(text: str) -> None:
    """Raise DataError for a text that tokenizers fail on."""
    if half_a_character(text):
        raise DataError(f"{text[:80]!r} holds half a character (a lone surrogate), which no tokenizer reads.")

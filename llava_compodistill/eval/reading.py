"""What an answer in words means: a letter, yes or no, a text. What cannot be read is None, and never right.

A benchmark may be read by two rules: its authors' ("official"), and a stricter one that guesses nothing. Each is a
`Reading`; a summary names them and has the figures of both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


def letter(text: str, count: int) -> int | None:
    """The first of the capitals A, B, … that stands by itself, as its number; None where there is none.

    "A man on a horse" reads as A: the raw text is kept in every record, and `letter_is_doubtful` tells how many there
    were.
    """
    found = re.search(rf"(?<![A-Za-z])([A-{chr(64 + count)}])(?![A-Za-z'])", text)
    return None if found is None else ord(found.group(1)) - 65


def option(text: str, count: int) -> int | None:
    """As `letter`, but an answer may also begin with an option's mark in small letters: "c", "c. on", "(c) on"."""
    last = chr(96 + count)
    found = re.match(rf"\s*(?:\(([a-{last}])\)|([a-{last}])(?=[.):]|\s*$))", text, re.IGNORECASE)
    if found is None:
        return letter(text, count)
    return ord((found.group(1) or found.group(2)).upper()) - 65


def first_word_letter(text: str, count: int) -> int | None:
    """SugarCrepe's reading in the code of the paper's authors: the first word that is one of the letters, whatever its
    case, so that "a man" reads as A. Words are runs of letters, digits and underscores."""
    letters = [chr(65 + number) for number in range(count)]
    found = next((word for word in re.findall(r"\w+", text.upper()) if word in letters), None)
    return None if found is None else letters.index(found)


def first_character(text: str, count: int) -> int | None:
    """Reefknot's reading of a choice: the first character, as a capital."""
    number = ord(text[:1].upper() or " ") - 65
    return number if 0 <= number < count else None


def letter_is_doubtful(text: str) -> bool:
    """Whether the letter that `letter` reads could be the article of a sentence."""
    return re.match(r"\s*A\s+[a-z]", text) is not None


def yes_or_no(text: str) -> bool | None:
    """POPE's rule: in the first sentence, without commas, a word No, not or no means no, and all else yes. None where
    nothing was answered, which POPE itself takes for a yes."""
    sentence = text.split(".")[0].replace(",", "")
    if not sentence.strip():
        return None
    return not {"No", "not", "no"} & set(sentence.split(" "))


def yes_unless_no(text: str) -> bool:
    """POPE's rule as POPE, LLaVA and R-Bench apply it: what holds no "no" is yes, an empty answer too."""
    return yes_or_no(text) is not False


def yes_within(text: str) -> bool:
    """Reefknot's rule: yes where "yes" stands anywhere in the answer, even within a word; all else is no."""
    return "yes" in text.lower()


def contains(text: str, label: str) -> bool:
    """Whether an open answer holds the label's words in a row; case, articles and punctuation do not count."""
    answer, wanted = (_words(part) for part in (text, label))
    spans = (answer[start : start + len(wanted)] for start in range(len(answer) - len(wanted) + 1))
    return bool(wanted) and any(span == wanted for span in spans)


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in ("a", "an", "the")]


def short(text: str) -> str:
    """GQA's form of an answer, as LLaVA's converter makes it: no full stop behind, small letters."""
    return text.rstrip(".").lower()


def yes_no_other(text: str) -> bool | None:
    """MME's rule: yes or no by the first four letters, None for all else (an empty answer too)."""
    begin = text.strip().lower()[:4]
    return True if "yes" in begin else False if "no" in begin else None


@dataclass(frozen=True)
class Reading:
    """A rule by which a benchmark's answers are read.

    Attributes:
        name: "official" for that of the benchmark's authors, "strict" for one that takes fewer answers as right.
        rule: in a sentence, for summaries and comparisons.
        yes_no: answer -> yes, no, or None where it is neither.
        letter: (answer, number of options) -> the option's number, or None where no letter can be read.
    """

    name: str
    rule: str
    yes_no: Callable[[str], bool | None] = yes_or_no
    letter: Callable[[str, int], int | None] = letter


#: How POPE's questions and R-Bench's are read.
YES_NO_READINGS = (
    Reading("strict", "yes unless the first sentence holds No, not or no; an empty answer is wrong, and no yes"),
    Reading("official", "yes unless the first sentence holds No, not or no; an empty answer is a yes", yes_unless_no),
)

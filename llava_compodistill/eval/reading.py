"""What an answer in words means: a letter, yes or no, a text. What cannot be read is None, and never right."""

from __future__ import annotations

import re


def letter(text: str, count: int) -> int | None:
    """The first of the letters A, B, … that stands by itself, as its number; None where there is none.

    "A man on a horse" reads as A, as in the authors' protocols: the raw text is kept in every record, and
    `letter_is_doubtful` tells how many there were.
    """
    found = re.search(rf"(?<![A-Za-z])([A-{chr(64 + count)}])(?![A-Za-z'])", text)
    return None if found is None else ord(found.group(1)) - 65


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

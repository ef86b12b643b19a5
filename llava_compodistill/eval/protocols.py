"""How a model is asked about an item: its requests, and the record that their responses make.

likelihood      mean log-probability per token of each caption, given the image
yes             log P("Yes") to `Does this figure show "…"?`
choice          the captions as options (A), (B) in both orders, the letter read from the answer
choice-logits   the same, the likelier of the letters: one forward an order, no answer that cannot be read
answer          the item's own question, answered in words
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .reading import Reading, first_word_letter, letter
from .requests import Answer, FirstWord, Likelihood, Request

if TYPE_CHECKING:
    from .benchmarks.base import Item

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
MATCH_PROMPT = 'Does this figure show "{caption}"? Please answer yes or no.'
#: With the space before (B) that the authors of the paper have there.
CHOICE_PROMPT = (
    "Which caption best describes the image?\n(A) {a}\n (B) {b}\n"
    "Answer with the option's alphabet from the given choices directly."
)
ORDERS = ([0, 1], [1, 0])
LETTERS = ("A", "B")
MATCHING = ("likelihood", "yes")
CHOOSING = ("choice", "choice-logits")
#: Longest answer of a choice, in tokens, as the paper's authors have it: a letter may come after a few words.
MAX_NEW_TOKENS = 32
#: How the protocols without an answer in words decide.
RULES = {
    "likelihood": "the caption with the higher mean log-probability per token is chosen; a tie is wrong",
    "yes": 'the caption with the higher log P("Yes") is chosen; a tie is wrong',
    "choice-logits": "the letter with the higher log-probability is chosen, in float32; a tie is wrong",
}
#: How the letters of `choice` are read.
LETTER_READINGS = (
    Reading("strict", "the first capital A or B that stands by itself; nothing else is a letter"),
    Reading(
        "official",
        "the first word of the answer that is A or B in any case, articles included, as in the authors' code",
        letter=first_word_letter,
    ),
)


def requests(item: Item, protocol: str, caption_prompt: str = CAPTION_PROMPT) -> list[Request]:
    """What to ask a model about an item, in a fixed order.

    Raises:
        ValueError: for an unknown protocol, or one that does not fit the item.
    """
    if protocol == "answer":
        return [Answer(item.images[0], item.prompt, item.max_new_tokens)]
    if protocol == "likelihood":
        return [Likelihood(image, caption_prompt, caption) for caption in item.captions for image in item.images]
    if protocol == "yes":
        prompts = [MATCH_PROMPT.format(caption=caption) for caption in item.captions]
        return [FirstWord(image, prompt, ("Yes", "No")) for prompt in prompts for image in item.images]
    if protocol not in CHOOSING:
        raise ValueError(f"protocol {protocol!r}: must be one of {', '.join((*MATCHING, *CHOOSING, 'answer'))}.")
    if len(item.captions) != 2:
        raise ValueError(f"item {item.id}: {len(item.captions)} captions, letters choose between two.")
    asked: list[Request] = []
    for image in item.images:
        for order in ORDERS:
            a, b = (item.captions[index] for index in order)
            prompt = CHOICE_PROMPT.format(a=a, b=b)
            if protocol == "choice":
                asked.append(Answer(image, prompt, MAX_NEW_TOKENS, exact=True))
            else:
                asked.append(FirstWord(image, prompt, LETTERS))
    return asked


def record(item: Item, protocol: str, responses: Sequence[Any]) -> dict[str, Any]:
    """The record of an item, as `benchmarks.figures` describes it, from the responses to `requests`."""
    made: dict[str, Any] = {"id": item.id, **item.fields}
    if protocol == "answer":
        return {**made, "prompt": item.prompt, "text": responses[0]}
    made["captions"] = list(item.captions)
    if protocol in MATCHING:
        values = [response if protocol == "likelihood" else response[0] for response in responses]
        width = len(item.images)
        made["scores"] = [values[start : start + width] for start in range(0, len(values), width)]
        if protocol == "yes":
            made["yes_no"] = list(responses)
        return made
    made["choices"] = []
    places = [(image, order) for image in range(len(item.images)) for order in ORDERS]
    for (image, order), response in zip(places, responses, strict=True):
        choice: dict[str, Any] = {"image": image, "options": order}
        if protocol == "choice":
            choice |= {"picked": letter(response, 2), "text": response}
        else:
            a, b = response
            choice |= {"picked": None if a == b else int(b > a), "logits": response}
        made["choices"].append(choice)
    return made

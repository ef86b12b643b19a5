"""Ask one model many things about images, each image and each beginning computed once.

Under a template everything up to the image is the same text, and the image comes first: all questions and captions on
an image share that prefix. It runs once an image, its keys and values are kept, and what differs runs in batches
behind it. LLaVA's own evaluation runs every question by itself, image included.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .. import compat
from ..errors import DataError
from ..hosts.llava.host import import_llava, import_llava_train
from ..hosts.llava.model import llava_core
from ..hosts.llava.templates import prepare_tokenizer, use_template
from ..record.head import dense_head
from .requests import Answer, Continuation, FirstWord, Likelihood, Request

logger = logging.getLogger(__name__)
T, R = TypeVar("T"), TypeVar("R")
IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100


@dataclass
class _Row:
    """A request as tokens: what comes behind the image, and which of it is to be predicted."""

    index: int
    request: Request
    before: tuple[int, ...]
    ids: list[int]
    labels: list[int]


class Engine:
    """Answers requests with one model.

    Args:
        model: a LLaVA model in eval mode with its vision tower loaded.
        tokenizer: its tokenizer.
        version: conversation template.
        batch_size: sequences at a time, behind the images' prefixes as well as the images themselves; halved when the
            GPU's memory does not hold as many. Models that cut an image into crops (anyres) read one image at a time,
            since their prefixes are of unequal length.
        open_image: a request's `image` -> picture in RGB; by default it is a file.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        version: str,
        batch_size: int = 32,
        open_image: Callable[[str], Any] | None = None,
    ):
        self.open_image = open_image or _open
        self.model, self.tokenizer, self.version, self.batch_size = llava_core(model), tokenizer, version, batch_size
        config = self.model.config
        self._crops = "anyres" in (getattr(config, "image_aspect_ratio", None) or "")
        prepare_tokenizer(tokenizer, use_template(version))
        self._preprocess = import_llava_train().preprocess
        self._process_images = import_llava("llava.mm_utils").process_images
        self._weight: torch.Tensor | None = None  # the head's, widened when it is first needed
        self._marker = "<image>"
        if getattr(config, "mm_use_im_start_end", False):
            self._marker = "<im_start><image><im_end>"

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], done: Callable[[int, Any], None] | None = None) -> list[Any]:
        """Answer requests, in order: each with what its class says.

        Args:
            requests: of any kinds; those on one image are computed together, wherever they stand.
            done: called with (position, response) as responses come.
        """
        responses: list[Any] = [None] * len(requests)
        for rows, caches in self._prefixes(requests):
            for kind in (Likelihood, Continuation, FirstWord, Answer):
                chosen = sorted((r for r in rows if isinstance(r.request, kind)), key=lambda row: len(row.ids))
                answer = self._generate if kind is Answer else self._log_probabilities
                for batch, answers in self._in_batches(chosen, lambda batch, do=answer, kept=caches: do(batch, kept)):
                    for row, response in zip(batch, answers, strict=True):
                        responses[row.index] = response
                        if done is not None:
                            done(row.index, response)
        return responses

    def _in_batches(
        self, things: list[T], work: Callable[[list[T]], R], most: int | None = None
    ) -> Iterator[tuple[list[T], R]]:
        """(batch, work(batch)) over all things, in smaller batches from where the GPU's memory did not suffice."""
        start = 0
        while start < len(things):
            batch = things[start : start + (most or self.batch_size)]
            try:
                result = work(batch)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                result = None
            if result is None:  # outside the handler, which holds on to the tensors of the failed call
                self.batch_size = len(batch) // 2
                torch.cuda.empty_cache()
                logger.warning(
                    "Out of GPU memory with %d at once: going on with %d (--batch-size).", len(batch), self.batch_size
                )
                continue
            yield batch, result
            start += len(batch)

    # -----------------------------------------------------------------------------------------------------------------
    # Prefixes
    # -----------------------------------------------------------------------------------------------------------------
    def _prefixes(self, requests: Sequence[Request]) -> Iterator[tuple[list[_Row], _Caches]]:
        """Requests in groups of images, with the keys and values of what stands before their own tokens."""
        use_template(self.version)
        groups: dict[tuple[tuple[int, ...], str], list[_Row]] = defaultdict(list)
        for index, request in enumerate(requests):
            row = self._tokens(index, request)
            groups[row.before, request.image].append(row)
        by_text: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for before, image in groups:
            by_text[before].append(image)
        for before, images in by_text.items():
            most = 1 if self._crops else None
            for some, caches in self._in_batches(images, lambda some, text=before: self._read(text, some), most):
                yield [row for image in some for row in groups[before, image]], caches

    def _tokens(self, index: int, request: Request) -> _Row:
        answer = request.answer if isinstance(request, (Likelihood, Continuation)) else "?"
        turns = [
            {"from": "human", "value": f"{self._marker}\n{request.prompt}"},
            {"from": "gpt", "value": answer},
        ]
        batch = self._preprocess([turns], self.tokenizer, has_image=True)
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        image = ids.index(IMAGE_TOKEN_INDEX)
        if ids.count(IMAGE_TOKEN_INDEX) != 1:
            raise ValueError(f"The prompt {request.prompt!r} holds an image token of its own.")
        if not isinstance(request, (Likelihood, Continuation)):
            ids = ids[: next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)]
            labels = labels[: len(ids)]
        return _Row(index, request, tuple(ids[:image]), ids[image + 1 :], labels[image + 1 :])

    def _read(self, before: tuple[int, ...], images: list[str]) -> _Caches:
        model = self.model
        processor = model.get_vision_tower().image_processor
        pictures = [self.open_image(name) for name in images]
        pixels = torch.stack([self._process_images([picture], processor, model.config)[0] for picture in pictures])
        # One token more, which is taken off again: a sequence of one is a decoding step for LLaVA, and left as it is.
        ids = torch.tensor([[*before, IMAGE_TOKEN_INDEX, 0]] * len(images), device=model.device)
        sizes = [picture.size for picture in pictures]
        merge = model.prepare_inputs_labels_for_multimodal
        embeds = merge(ids, None, None, None, None, pixels.to(model.device, model.dtype), sizes)[4][:, :-1]
        outputs = model.get_model()(inputs_embeds=embeds, use_cache=True)
        numbers = {image: number for number, image in enumerate(images)}
        return _Caches(compat.read_cache(outputs.past_key_values), numbers, embeds.shape[1])

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_model().embed_tokens(ids)

    # -----------------------------------------------------------------------------------------------------------------
    # Behind the prefixes
    # -----------------------------------------------------------------------------------------------------------------
    def _forward(self, rows: list[_Row], caches: _Caches):
        """(last hidden states [R, N, D], past_key_values, lengths [R]) of the rows' own tokens, padded on the right,
        where nothing that is real sees it."""
        device = self.model.device
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)
        width = int(lengths.max())
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=device)
        positions = torch.arange(caches.length, caches.length + width, device=device).expand(len(rows), -1)
        outputs = self.model.get_model()(
            inputs_embeds=self._embed(ids),
            attention_mask=torch.ones(len(rows), caches.length + width, dtype=torch.long, device=device),
            position_ids=positions,
            past_key_values=caches.of([row.request.image for row in rows]),
            use_cache=True,
        )
        return outputs.last_hidden_state, outputs.past_key_values, lengths

    def _log_probabilities(self, rows: list[_Row], caches: _Caches) -> list[Any]:
        hidden, _, lengths = self._forward(rows, caches)
        responses: list[Any] = []
        if isinstance(rows[0].request, FirstWord):
            last = hidden[torch.arange(len(rows), device=hidden.device), lengths - 1]
            log_probs = self._head(last)
            for row, values in zip(rows, log_probs, strict=True):
                responses.append([float(values[self._first_token(row, word)]) for word in row.request.words])
            return responses
        for row, states in zip(rows, hidden, strict=True):
            places = [place for place, label in enumerate(row.labels) if label != IGNORE_INDEX]
            log_probs = self._head(states[[place - 1 for place in places]])
            targets = torch.tensor([row.labels[place] for place in places], device=hidden.device)
            chosen = log_probs.gather(1, targets[:, None])
            if isinstance(row.request, Continuation):
                likeliest = log_probs[:, : len(self.tokenizer)].argmax(dim=1)
                responses.append((float(chosen.mean()), bool((likeliest == targets).all())))
            else:
                responses.append(float(chosen.mean()))
        return responses

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """In float32: at 16 bits the logits of "A" and "B" often tie."""
        if self._weight is None:
            head = self.model.get_output_embeddings()
            self._weight, self._bias = (
                None if part is None else part.float() for part in dense_head(head, hidden[:1].to(self.model.dtype))
            )
        return torch.log_softmax(torch.nn.functional.linear(hidden.float(), self._weight, self._bias), dim=-1)

    def _first_token(self, row: _Row, word: str) -> int:
        """The token that an answer beginning with a word begins with, under the template."""
        turns = [{"from": "human", "value": f"{self._marker}\n{row.request.prompt}"}, {"from": "gpt", "value": word}]
        labels = self._preprocess([turns], self.tokenizer, has_image=True)["labels"][0]
        return int(labels[labels != IGNORE_INDEX][0])

    def _likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the tokens that the tokenizer has: rows that pad the vocabulary cannot be decoded."""
        return self.model.get_output_embeddings()(hidden)[:, : len(self.tokenizer)].argmax(dim=-1)

    def _generate(self, rows: list[_Row], caches: _Caches) -> list[str]:
        model, device = self.model, self.model.device
        hidden, cache, lengths = self._forward(rows, caches)
        width, count = hidden.shape[1], len(rows)
        every = torch.arange(count, device=device)
        token = self._likeliest(hidden[every, lengths - 1])
        # The rows' padding lies between their prompts and their answers now, and must not be seen.
        prompt = torch.arange(width, device=device)[None] < lengths[:, None]
        mask = torch.cat([torch.ones(count, caches.length, device=device, dtype=torch.bool), prompt], dim=1).long()
        limit = torch.tensor([row.request.max_new_tokens for row in rows], device=device)
        stop, answers = self.tokenizer.eos_token_id, []
        ended = torch.zeros(count, dtype=torch.bool, device=device)
        for step in range(int(limit.max())):
            ended |= (token == stop) | (step >= limit)
            if bool(ended.all()):
                break
            answers.append(torch.where(ended, stop, token))
            mask = torch.cat([mask, mask.new_ones(count, 1)], dim=1)
            outputs = model.get_model()(
                inputs_embeds=self._embed(token[:, None]),
                attention_mask=mask,
                position_ids=(caches.length + lengths + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            token = self._likeliest(outputs.last_hidden_state[:, -1])
        if not answers:
            return [""] * count
        texts = []
        for tokens in torch.stack(answers, dim=1).tolist():
            kept = tokens[: tokens.index(stop)] if stop in tokens else tokens
            texts.append(self.tokenizer.decode(kept, skip_special_tokens=True).strip())
        return texts


class _Caches:
    """Keys and values of several images' prefixes."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], numbers: dict[str, int], length: int):
        self.pairs, self.numbers, self.length = pairs, numbers, length

    def of(self, images: list[str]) -> Any:
        """A cache with one row for each of the images named, copied: a forward may write into it."""
        index = torch.tensor([self.numbers[image] for image in images], device=self.pairs[0][0].device)
        return compat.make_cache([(keys[index], values[index]) for keys, values in self.pairs])


def _open(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:  # what PIL raises for a broken file, too
        raise DataError(f"{path}: cannot be read as an image ({error}).") from error

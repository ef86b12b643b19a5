"""Ask one model many things about images, each image and each beginning computed once.

Under a template everything up to the image is the same text, and the image comes first: all questions and captions on
an image share that prefix. It runs once an image, its keys and values are kept, and what differs runs in batches
behind it. LLaVA's own evaluation runs every question by itself, image included.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from .. import compat
from ..errors import DataError, NonFiniteModelError, SampleError
from ..hosts.llava.decoding import continue_sequences
from ..hosts.llava.host import import_llava, import_llava_train
from ..hosts.llava.model import llava_core
from ..hosts.llava.pixels import quick
from ..hosts.llava.templates import prepare_tokenizer, use_template
from ..record.head import dense_head
from .marks import Picture, open_picture
from .pictures import MakePixels, Pictures, Pixels, Unreadable
from .requests import Answer, Continuation, FirstWord, Likelihood, Request, check_text

logger = logging.getLogger(__name__)
T, R = TypeVar("T"), TypeVar("R")
IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100
#: Logits computed at a time: 256 MiB in float32.
_LOGITS_AT_ONCE = 2**26


@dataclass
class Row:
    """A request as tokens: a whole sequence, one of them the image, and which of it is to be predicted."""

    index: int
    request: Request
    ids: list[int]
    labels: list[int]
    image: int

    @property
    def before(self) -> tuple[int, ...]:
        """The tokens that come before the image."""
        return tuple(self.ids[: self.image])

    @property
    def behind(self) -> list[int]:
        """The tokens that come behind the image."""
        return self.ids[self.image + 1 :]


class Engine:
    """Answers requests with one model.

    Args:
        model: a LLaVA model in eval mode with its vision tower loaded.
        tokenizer: its tokenizer.
        version: conversation template.
        batch_size: sequences at a time, behind the images' prefixes as well as the images themselves; halved when the
            GPU's memory does not hold as many. Models that cut an image into crops (anyres) read one image at a time,
            since their prefixes are of unequal length.
        open_image: a request's `image` -> picture in RGB; by default it is a file, or a file with marks.
        image_workers: processes that read the images of `expecting` ahead of the model.
        processes: engines like this one on this machine, which share its memory.

    Attributes:
        pictures: makes the images' pixels.
    """

    #: What it can answer, in the order in which the requests on a group of images are computed.
    kinds: tuple[type, ...] = (Likelihood, Continuation, FirstWord, Answer)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        version: str,
        batch_size: int = 32,
        open_image: Callable[[Any], Any] | None = None,
        image_workers: int = 0,
        processes: int = 1,
    ):
        self.model, self.tokenizer, self.version, self.batch_size = llava_core(model), tokenizer, version, batch_size
        config = self.model.config
        self._crops = "anyres" in (getattr(config, "image_aspect_ratio", None) or "")
        self._prepare()
        process = import_llava("llava.mm_utils").process_images
        processor = quick(self.model.get_vision_tower().image_processor)
        make = MakePixels(process, processor, config, self.model.dtype, open_image or open_picture)
        self.pictures = Pictures(make, image_workers, ahead=2 * batch_size, processes=processes)
        self._weight: torch.Tensor | None = None  # the head's, widened when it is first needed
        self._marker = "<image>"
        if getattr(config, "mm_use_im_start_end", False):
            self._marker = "<im_start><image><im_end>"

    @contextlib.contextmanager
    def expecting(self, pictures: Iterable[Picture]) -> Iterator[None]:
        """In here `run` will be asked about these pictures, in this order: they are read ahead."""
        self.pictures.expect(pictures)
        try:
            yield
        finally:
            self.pictures.close()

    @torch.inference_mode()
    def run(
        self,
        requests: Sequence[Request],
        done: Callable[[int, Any], None] | None = None,
        *,
        keep_going: bool = False,
    ) -> list[Any]:
        """Answer requests, in order: each with what its class says.

        Args:
            requests: of any kinds; those on one image are computed together, wherever they stand.
            done: called with (position, response) as responses come.
            keep_going: the response to a request that cannot be asked, or whose image cannot be read, is the DataError
                that says why.

        Raises:
            DataError: for such a request, unless the others are to go on.
        """
        use_template(self.version)
        self.pictures.begin()
        rows, responses = [], [None] * len(requests)
        for index, request in enumerate(requests):
            try:
                rows.append(self._tokens(index, request))
            except (DataError, SampleError) as error:
                if not keep_going:
                    raise
                responses[index] = error if isinstance(error, DataError) else DataError(str(error))
        for batch, answers in self._answered(rows):
            for row, response in zip(batch, answers, strict=True):
                if isinstance(response, Unreadable) and not keep_going:
                    raise response
                responses[row.index] = response
                if done is not None:
                    done(row.index, response)
        return responses

    def _answered(self, rows: list[Row]) -> Iterator[tuple[list[Row], list[Any]]]:
        """Rows in batches, with their responses."""
        for group, caches in self._prefixes(rows):
            broken = [row for row in group if row.request.image in caches.broken]
            yield broken, [caches.broken[row.request.image] for row in broken]
            group = [row for row in group if row.request.image not in caches.broken]
            for kind in self.kinds:
                chosen = sorted((r for r in group if isinstance(r.request, kind)), key=lambda row: len(row.behind))
                if kind is not Answer:
                    yield from self._in_batches(chosen, partial(self._log_probabilities, caches=caches))
                    continue
                for exact in (False, True):
                    alike = [row for row in chosen if row.request.exact == exact]
                    yield from self._in_batches(alike, partial(self._generate, caches=caches))

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
    # Tokens and images
    # -----------------------------------------------------------------------------------------------------------------
    def _prepare(self) -> None:
        """What `_tokens` needs: LLaVA's training code, which it takes the prompts from."""
        # Another template's padding token may be this one's end token, which the collator's mask would then hide.
        template = use_template(self.version)
        prepare_tokenizer(self.tokenizer, template)
        # Templates in the style of v0 have no end token: behind an answer the next turn begins with this.
        self._next_turn = template.sep.strip() if template.sep_style.name == "SINGLE" else ""
        self._preprocess = import_llava_train().preprocess

    def _tokens(self, index: int, request: Request) -> Row:
        """The sequence of a request: with its answer where it has one, else up to where an answer would begin."""
        if not isinstance(request, self.kinds):
            raise ValueError(f"{type(self).__name__} cannot answer {type(request).__name__}.")
        given = isinstance(request, (Likelihood, Continuation))
        check_text(request.prompt + (request.answer if given else ""))
        ids, labels = self._preprocessed(request, request.answer if given else "?")
        if ids.count(IMAGE_TOKEN_INDEX) != 1:
            raise DataError(f"the prompt {request.prompt[:80]!r} holds an image token of its own.")
        if not given:
            ids = ids[: next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)]
            labels = labels[: len(ids)]
        length = len(ids) - 1 + self.model.get_vision_tower().num_patches  # crops may be more
        longest = getattr(self.model.config, "max_position_embeddings", None) or length
        if length > longest:
            raise DataError(f"{length} tokens with the image, the model reads {longest}: {request.prompt[:80]!r}.")
        return Row(index, request, ids, labels, ids.index(IMAGE_TOKEN_INDEX))

    def _preprocessed(self, request: Request, answer: str) -> tuple[list[int], list[int]]:
        """Tokens and labels of a request with an answer; labels are the answer's alone.

        Under templates in the style of v0 LLaVA's labels are also those of the roles (of the user's two tokens, of the
        model's all). There an answer begins where another one would be other tokens.
        """
        ids, labels = self._labelled(request, answer)
        if not self._next_turn:
            return ids, labels
        others, _ = self._labelled(request, "?" if answer[:1] != "?" else "A")
        start = next((place for place, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), 0)
        return ids, [IGNORE_INDEX] * start + ids[start:]

    def _labelled(self, request: Request, answer: str) -> tuple[list[int], list[int]]:
        turns = [{"from": "human", "value": f"{self._marker}\n{request.prompt}"}, {"from": "gpt", "value": answer}]
        batch = self._preprocess([turns], self.tokenizer, has_image=True)
        return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()

    def _first_token(self, row: Row, word: str) -> int:
        """The token that an answer beginning with a word begins with, under the template."""
        _, labels = self._preprocessed(row.request, word)
        return next(label for label in labels if label != IGNORE_INDEX)

    def _pixels(self, images: Sequence[Picture]) -> list[Pixels]:
        """The tower's input for each image; raises Unreadable for one that cannot be read."""
        made = self.pictures.take(images)
        for pixels in made:
            if isinstance(pixels, Unreadable):
                raise pixels
        return made

    # -----------------------------------------------------------------------------------------------------------------
    # Prefixes
    # -----------------------------------------------------------------------------------------------------------------
    def _prefixes(self, rows: list[Row]) -> Iterator[tuple[list[Row], _Caches]]:
        """Rows in groups of images, with the keys and values of what stands before their own tokens."""
        groups: dict[tuple[tuple[int, ...], Picture], list[Row]] = defaultdict(list)
        for row in rows:
            groups[row.before, row.request.image].append(row)
        by_text: dict[tuple[int, ...], list[Picture]] = defaultdict(list)
        for before, image in groups:
            by_text[before].append(image)
        for before, images in by_text.items():
            most = 1 if self._crops else None
            for batch, caches in self._in_batches(images, lambda batch, text=before: self._read(text, batch), most):
                yield [row for image in batch for row in groups[before, image]], caches

    def _read(self, before: tuple[int, ...], images: list[Picture]) -> _Caches:
        model = self.model
        made = dict(zip(images, self.pictures.take(images), strict=True))
        broken = {image: pixels for image, pixels in made.items() if isinstance(pixels, Unreadable)}
        images = [image for image in images if image not in broken]
        if not images:
            return _Caches([], {}, 0, broken)
        # One token more, which is taken off again: a sequence of one is a decoding step for LLaVA, and left as it is.
        ids = torch.tensor([[*before, IMAGE_TOKEN_INDEX, 0]] * len(images), device=model.device)
        merge = model.prepare_inputs_labels_for_multimodal
        pictures = torch.stack([made[image].values for image in images]).to(model.device, model.dtype)
        embeds = merge(ids, None, None, None, None, pictures, [made[image].size for image in images])[4][:, :-1]
        outputs = model.get_model()(inputs_embeds=embeds, use_cache=True)
        numbers = {image: number for number, image in enumerate(images)}
        return _Caches(compat.read_cache(outputs.past_key_values), numbers, embeds.shape[1], broken)

    def _forward(self, rows: list[Row], caches: _Caches):
        """(last hidden states [R, N, D], past_key_values, lengths [R]) of the rows' own tokens, padded on the right,
        where nothing that is real sees it."""
        device = self.model.device
        behind = [row.behind for row in rows]
        lengths = torch.tensor([len(ids) for ids in behind], device=device)
        width = int(lengths.max())
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in behind], device=device)
        positions = torch.arange(caches.length, caches.length + width, device=device).expand(len(rows), -1)
        outputs = self.model.get_model()(
            inputs_embeds=self._embed(padded),
            attention_mask=torch.ones(len(rows), caches.length + width, dtype=torch.long, device=device),
            position_ids=positions,
            past_key_values=caches.of([row.request.image for row in rows]),
            use_cache=True,
        )
        return outputs.last_hidden_state, outputs.past_key_values, lengths

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_model().embed_tokens(ids)

    def _log_probabilities(self, rows: list[Row], caches: _Caches) -> list[Any]:
        hidden, _, lengths = self._forward(rows, caches)
        if isinstance(rows[0].request, FirstWord):
            return self._first_words(rows, hidden[torch.arange(len(rows), device=hidden.device), lengths - 1])
        labels = torch.full(hidden.shape[:2], IGNORE_INDEX)
        for number, row in enumerate(rows):
            targets = row.labels[row.image + 2 :]  # the first token behind the image is predicted within the prefix
            labels[number, : len(targets)] = torch.tensor(targets)
        labels = labels.to(hidden.device)
        asked = labels != IGNORE_INDEX
        return self._likelihoods(rows, hidden[asked], labels[asked], asked.sum(dim=1).tolist())

    # -----------------------------------------------------------------------------------------------------------------
    # From hidden states to responses
    # -----------------------------------------------------------------------------------------------------------------
    def _first_words(self, rows: list[Row], hidden: torch.Tensor) -> list[list[float]]:
        """Responses from the hidden states [R, D] that predict each row's first token."""
        log_probs = torch.log_softmax(self._logits(hidden), dim=-1)
        return [
            [float(values[self._first_token(row, word)]) for word in row.request.words]
            for row, values in zip(rows, log_probs, strict=True)
        ]

    def _likelihoods(
        self, rows: list[Row], hidden: torch.Tensor, targets: torch.Tensor, counts: list[int]
    ) -> list[Any]:
        """Responses from the hidden states [A, D] that predict the answers' tokens [A], row by row, `counts` each."""
        values, greedy = [], []
        vocabulary = self.model.config.vocab_size
        for states, wanted in zip(
            *(part.split(max(1, _LOGITS_AT_ONCE // vocabulary)) for part in (hidden, targets)), strict=True
        ):
            logits = self._logits(states)
            values.append(torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0])
            greedy.append(logits[:, : len(self.tokenizer)].argmax(dim=-1) == wanted)
        responses: list[Any] = []
        answers = zip(rows, torch.cat(values).split(counts), torch.cat(greedy).split(counts), strict=True)
        for row, log_probs, hits in answers:
            mean = float(log_probs.mean())
            responses.append((mean, bool(hits.all())) if isinstance(row.request, Continuation) else mean)
        return responses

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """In float32: at 16 bits the logits of "A" and "B" often tie."""
        if self._weight is None:
            head = self.model.get_output_embeddings()
            self._weight, self._bias = (
                None if part is None else part.float() for part in dense_head(head, hidden[:1].to(self.model.dtype))
            )
        return self._finite(torch.nn.functional.linear(hidden.float(), self._weight, self._bias))

    def _finite(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits; a model that gives NaN would get scores like one that sees nothing."""
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteModelError(
                "The model's logits are NaN or infinite: its weights are damaged, or its precision is too low "
                f"({self.model.dtype}; try --dtype float32 or bfloat16)."
            )
        return logits

    def _likeliest(self, hidden: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """Of the tokens that the tokenizer has: rows that pad the vocabulary cannot be decoded."""
        logits = self._logits(hidden) if exact else self._finite(self.model.get_output_embeddings()(hidden))
        return logits[:, : len(self.tokenizer)].argmax(dim=-1)

    def _generate(self, rows: list[Row], caches: _Caches) -> list[str]:
        end, exact = [self.tokenizer.eos_token_id], rows[0].request.exact
        answers, _ = self._continued(rows, caches, lambda states, step: self._likeliest(states, exact), end)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        return [(text.split(self._next_turn)[0] if self._next_turn else text).strip() for text in texts]

    def _continued(
        self,
        rows: list[Row],
        caches: _Caches,
        choose: Callable[[torch.Tensor, int], torch.Tensor],
        ends: Sequence[int],
    ) -> tuple[list[list[int]], list[bool]]:
        """The rows' answers as `continue_sequences` gives them."""
        model, device = self.model, self.model.device
        hidden, cache, lengths = self._forward(rows, caches)
        count = len(rows)
        # The rows' padding lies between their prompts and their answers, and must not be seen.
        prompt = torch.arange(hidden.shape[1], device=device)[None] < lengths[:, None]
        mask = torch.cat([torch.ones(count, caches.length, device=device, dtype=torch.bool), prompt], dim=1).long()
        return continue_sequences(
            model,
            hidden[torch.arange(count, device=device), lengths - 1],
            cache,
            mask,
            caches.length + lengths,
            choose,
            ends,
            torch.tensor([row.request.max_new_tokens for row in rows], device=device),
        )


class _Caches:
    """Keys and values of several images' prefixes, and the images that are `broken`."""

    def __init__(
        self,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        numbers: dict[Picture, int],
        length: int,
        broken: dict[Picture, Unreadable],
    ):
        self.pairs, self.numbers, self.length, self.broken = pairs, numbers, length, broken

    def of(self, images: list[Picture]) -> Any:
        """A cache with one row for each of the images named, copied: a forward may write into it."""
        index = torch.tensor([self.numbers[image] for image in images], device=self.pairs[0][0].device)
        return compat.make_cache([(keys[index], values[index]) for keys, values in self.pairs])

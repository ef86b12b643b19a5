"""The engine's other way: forwards of whole sequences, for analyses that intervene in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..hosts.llava.host import import_llava_train
from ..hosts.llava.templates import use_template
from ..record.merge import MergeRecorder, record_merge
from .engine import Engine, Row
from .requests import Continuation, FirstWord, Likelihood, Request


class WholeSequences(Engine):
    """Answers from forwards of whole sequences, image included, in batches in the order of the requests. It generates
    nothing (`Answer`).

    Args:
        inside: makes the context that every forward runs in.
    """

    kinds = (Likelihood, Continuation, FirstWord)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        inside: Callable[[MergeRecorder], contextlib.AbstractContextManager] | None = None,
        **options: Any,
    ):
        super().__init__(model, tokenizer, **options)
        self._inside = inside or (lambda recorder: contextlib.nullcontext())
        self._collate = import_llava_train().DataCollatorForSupervisedDataset(tokenizer=tokenizer)

    def collate(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """One batch of the requests' sequences as LLaVA's collator makes it, on the model's device: input_ids [B, N],
        labels [B, N], attention_mask [B, N], images [B, 3, H, W]."""
        use_template(self.version)
        return self._collated([self._tokens(index, request) for index, request in enumerate(requests)])[0]

    def _collated(self, rows: list[Row]) -> tuple[dict[str, torch.Tensor], list[tuple[int, int]]]:
        pixels = self._pixels([row.request.image for row in rows])
        batch = self._collate(
            [
                {"input_ids": torch.tensor(row.ids), "labels": torch.tensor(row.labels), "image": image.values}
                for row, image in zip(rows, pixels, strict=True)
            ]
        )
        return {name: value.to(self.model.device) for name, value in batch.items()}, [image.size for image in pixels]

    def _answered(self, rows: list[Row]) -> Iterator[tuple[list[Row], list[Any]]]:
        for kind in self.kinds:
            chosen = [row for row in rows if isinstance(row.request, kind)]
            yield from self._in_batches(chosen, self._whole, 1 if self._crops else None)

    def _whole(self, rows: list[Row]) -> list[Any]:
        inputs, sizes = self._collated(rows)
        images = inputs["images"].to(self.model.dtype)
        ids, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
        with record_merge(self.model) as recorder, self._inside(recorder):
            _, positions, mask, _, embeds, _ = self.model.prepare_inputs_labels_for_multimodal(
                ids, None, mask, None, labels, images, sizes
            )
            hidden = self.model.get_model()(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        batch = recorder.batch
        if isinstance(rows[0].request, FirstWord):
            last = batch.real.long().cumsum(dim=1).argmax(dim=1)  # whichever side is padded
            return self._first_words(rows, hidden[torch.arange(len(rows), device=hidden.device), last])
        asked = batch.answer_mask()
        return self._likelihoods(rows, hidden[asked], batch.answer_targets(), asked.sum(dim=1).tolist())

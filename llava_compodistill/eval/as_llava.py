"""The engine with the prompts and the decoding of LLaVA's evaluation (`llava.eval.model_vqa_loader`).

`Engine` itself asks with the tokens that LLaVA's training code makes of a conversation, up to where an answer would
begin. That code and the evaluation's agree under most templates, but not under all: `plain` leaves the question out in
training, and templates in the style of v0 are written another way there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from ..errors import CheckpointError, DataError
from ..hosts.llava.host import import_llava
from .engine import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Engine, Row
from .pictures import Unreadable
from .requests import Answer, Request, check_text

#: Settings of generate() by which a greedy answer would be another one, and the values with which they do nothing.
_UNKNOWN_HERE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "sequence_bias", "constraints", "force_words_ids"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "stop_strings"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "max_time", "dola_layers"), ()),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("penalty_alpha", "diversity_penalty", "token_healing"), (0, False)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "num_return_sequences"), (1,)),
}


class AsLlava(Engine):
    """Answers questions (`Answer` alone) as LLaVA's model_vqa_loader does, in batches.

    The tokens of the prompts are LLaVA's, and so are the rules of decoding: those of the checkpoint's generation
    config, whatever end token the template has. In float32 the answers are the same; at 16 bits batches are rounded in
    another way, so that a few may differ.

    Raises:
        CheckpointError: for a generation config with rules that are not known here.
    """

    kinds = (Answer,)

    def _prepare(self) -> None:
        self._conversation = import_llava("llava.conversation").conv_templates[self.version]
        self._tokenize = import_llava("llava.mm_utils").tokenizer_image_token
        config = self.model.generation_config
        for name, idle in _UNKNOWN_HERE.items():
            value = getattr(config, name, None)
            if value is not None and value not in idle:
                raise CheckpointError(
                    f"generation_config.json of the model: the engine does not know {name} {value!r}, which changes "
                    "greedy answers. Ask through LLaVA's own module (without --engine, ENGINE=0)."
                )
        ends = config.eos_token_id
        self._ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._never = list(config.suppress_tokens or [])
        penalty = config.repetition_penalty
        self._penalty = None if penalty in (None, 1) else RepetitionPenaltyLogitsProcessor(float(penalty))

    def _tokens(self, index: int, request: Request) -> Row:
        if not isinstance(request, self.kinds):
            raise ValueError(f"{type(self).__name__} cannot answer {type(request).__name__}.")
        check_text(request.prompt)
        conversation = self._conversation.copy()
        conversation.append_message(conversation.roles[0], f"{self._marker}\n{request.prompt}")
        conversation.append_message(conversation.roles[1], None)
        ids = self._tokenize(conversation.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX)
        if ids.count(IMAGE_TOKEN_INDEX) != 1:
            raise DataError(f"the prompt {request.prompt[:80]!r} holds an image token of its own.")
        return Row(index, request, ids, [IGNORE_INDEX] * len(ids), ids.index(IMAGE_TOKEN_INDEX))

    def _generate(self, rows: list[Row], caches: Any) -> list[str | Unreadable]:
        asked = [self._cut(row, caches.length) for row in rows]
        left = [row for row in asked if isinstance(row, Row)]
        answers = iter(self._answer_tokens(left, caches) if left else [])
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [row if isinstance(row, Unreadable) else decode(next(answers)).strip() for row in asked]

    def _answer_tokens(self, rows: list[Row], caches: Any) -> list[list[int]]:
        """What generate() returns for each row, its end token included."""
        said: list[torch.Tensor] = []

        def choose(states: torch.Tensor, step: int) -> torch.Tensor:
            scores = self._finite(self.model.get_output_embeddings()(states)).float()
            if self._penalty is not None and said:
                scores = self._penalty(torch.stack(said, dim=1), scores)
            scores[:, self._never] = -torch.inf
            said.append(scores.argmax(dim=-1))
            return said[-1]

        answers, stopped = self._continued(rows, caches, choose, self._ends)
        return [
            [*tokens, int(said[len(tokens)][number])] if whole else tokens
            for number, (tokens, whole) in enumerate(zip(answers, stopped, strict=True))
        ]

    def _cut(self, row: Row, before: int) -> Row | Unreadable:
        """A row as LLaVA's merge leaves it, which cuts off what goes beyond the longest sequence of training; an error
        where nothing of the question would be left.

        Args:
            before: how many positions the image and what comes before it take.
        """
        longest = getattr(self.model.config, "tokenizer_model_max_length", None)
        if longest is None or before + max(len(row.behind), 2) <= longest:
            return row
        room = longest - before
        if room <= 1:  # the image itself may have been cut, to one position less than the longest sequence
            return Unreadable(
                f"{row.request.image}: the image fills the {longest} positions of tokenizer_model_max_length (the "
                f"checkpoint's config.json), and nothing is left for the question {row.request.prompt!r}."
            )
        return replace(row, ids=row.ids[: row.image + 1 + room])

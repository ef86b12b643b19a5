"""`record(model, needs)`: one forward of one model, and what it is asked to leave behind.

A method asks its student and its teacher for passes in the same words. Nothing is computed that nobody asked for: the
head runs on the rows that are named, attention maps come from the layers that are named and are reduced to the means
of their groups while the forward runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..hosts import host_of
from ..hosts.base import MergedBatch
from ..ops.answer_loss.log_probs import answer_log_probs
from .attention import GroupMeans, capture_visual_attention
from .head import HeadRows, TopRows, at_head
from .merge import record_merge
from .padding import padded, without_padding
from .patch import replaced

#: Layers whose mean attention map is wanted.
Group = tuple[int, ...]
#: (number of a decoder layer, heads): the maps of single heads.
LayerHeads = tuple[int, tuple[int, ...]]
#: (number of a decoder layer or EMBEDDINGS, name of rows as `MergedBatch.rows` takes it)
LayerRows = tuple[int, str]
#: In place of a layer's number: what the first layer receives, visual tokens as the adapter makes them among it.
EMBEDDINGS = -1


@dataclass(frozen=True)
class Needs:
    """What a pass is to leave behind.

    Attributes:
        head: names of rows whose last hidden states, the head's input, are kept.
        groups: groups of layers whose mean head-averaged attention over the visual tokens is kept.
        heads: (layer, heads): the attention of these heads over the visual tokens is kept, head by head.
        hidden: (layer, name of rows): the layer's output there is kept; for EMBEDDINGS what the first layer receives.
        graph: whether gradients flow through maps (what else is kept has the graph that the forward had).
        routing: whether it is kept how layers with experts route tokens.
        log_probs: whether the log-probabilities of the answer tokens are kept.
    """

    head: frozenset[str] = frozenset()
    groups: frozenset[Group] = frozenset()
    hidden: frozenset[LayerRows] = frozenset()
    graph: bool = False
    heads: frozenset[LayerHeads] = frozenset()
    routing: bool = False
    log_probs: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.head | other.head,
            self.groups | other.groups,
            self.hidden | other.hidden,
            self.graph or other.graph,
            self.heads | other.heads,
            self.routing or other.routing,
            self.log_probs or other.log_probs,
        )


@dataclass
class Pass:
    """What a forward has left behind.

    Attributes:
        batch: where its tokens are.
        head: by name of rows, what reached the head there.
        maps: by group, the mean map [B, N, N_v]; empty for a batch without an image.
        head_maps: by (layer, heads), [B, number of heads, N, N_v]; empty for a batch without an image.
        hidden: by (layer, name of rows), [R, D].
        routing: by layer, what its router returned.
        log_probs: [R], those of the answer tokens, in nats and without a graph.
        returned: what `on_head` returned, as it came out of the head's call.
        aligned: of a teacher with another tokenizer, [B, S, 2]: the answer rows that correspond, by their numbers
            within a sample, of the student and of the teacher, padded with -1 (`pair.tokens.align_answers`).
        switched: of a student, the teacher's pass on the student's visual features, where a term asks for it.
        blind: of a teacher, its pass on the text alone of the samples with an image, where a term asks for it and
            there is such a sample.
        top: of a teacher that is read from a cache, its distributions at the answer rows; None of a forward.
        own: of a student that has answered samples of the batch itself, [B]: the number of the first answer row of the
            sample that predicts a token of its own answer; -1 for a sample with the data's answers alone.
    """

    batch: MergedBatch
    head: dict[str, HeadRows] = field(default_factory=dict)
    maps: dict[Group, torch.Tensor] = field(default_factory=dict)
    head_maps: dict[LayerHeads, torch.Tensor] = field(default_factory=dict)
    hidden: dict[LayerRows, torch.Tensor] = field(default_factory=dict)
    routing: dict[int, Any] = field(default_factory=dict)
    log_probs: torch.Tensor | None = None
    returned: torch.Tensor | None = None
    aligned: torch.Tensor | None = None
    switched: Pass | None = None
    blind: Pass | None = None
    top: TopRows | None = None
    own: torch.Tensor | None = None

    def given_rows(self) -> torch.Tensor | None:
        """[R] bool, of the answer rows those whose label is the data's and not the student's own; None for all."""
        if self.own is None:
            return None
        number = self.batch.answer_mask().long().cumsum(dim=1) - 1
        own = (self.own >= 0)[:, None] & (number >= self.own[:, None])
        return ~own[self.batch.places("answer")]


class PassRecorder:
    """Holds the `Pass` of the newest forward; see `record`."""

    def __init__(self) -> None:
        self._pass: Pass | None = None

    @property
    def latest(self) -> Pass:
        if self._pass is None:
            raise RuntimeError("No forward has run inside record() yet.")
        return self._pass

    @property
    def batch(self) -> MergedBatch:
        """Where the tokens of the newest forward are, also while it runs."""
        return self.latest.batch


@contextlib.contextmanager
def record(
    model: nn.Module,
    needs: Needs,
    *,
    impl: str = "auto",
    on_head: Callable[[Pass], torch.Tensor] | None = None,
    on_end: Callable[[Pass], Mapping[str, torch.Tensor]] | None = None,
    padding_free: bool = False,
) -> Iterator[PassRecorder]:
    """Record every forward of a model inside the context. Training keeps it open until the backward is done.

    The model's logits are not computed: with no `on_head` the head returns zeros of shape [B, 1, 1].

    Args:
        model: a multimodal causal language model (not a wrapper around one; the forward may be a wrapper's).
        needs: what is to be kept.
        impl: implementation of the attention map op, see `visual_attention_map`.
        on_head: called inside the head's own call, where its weights are whole under ZeRO-3; returns a tensor that
            leaves the model through the head's output.
        on_end: called when the forward ends, inside the outermost wrapper of the model (DDP, FSDP, DeepSpeed); what it
            returns is what the model returns, so that wrappers find every tensor that gradients start from.
        padding_free: whether the decoder layers run without padding (`without_padding`). What is recorded is the same.

    Raises:
        ValueError, RuntimeError: see `capture_visual_attention`, `record_merge` and `without_padding`.
    """
    host = host_of(model)
    recorder = PassRecorder()
    means = GroupMeans(sorted(needs.groups))
    by_head = {layer for layer, _ in needs.heads}
    routers = host.routers(model)
    run = model.forward

    def begin(batch: MergedBatch) -> None:
        recorder._pass = Pass(batch)
        for router in routers.values():
            router.real = batch.real
        means.begin()
        if capture is not None:
            capture.begin()

    def reduce(layer: int, attention: torch.Tensor) -> tuple[torch.Tensor, dict[LayerHeads, torch.Tensor]]:
        if layer not in by_head:
            return attention, {}
        # (A list as an index would be copied to the device at once.)
        wanted = [key for key in sorted(needs.heads) if key[0] == layer]
        heads = {key: torch.stack([attention[:, head] for head in key[1]], dim=1) for key in wanted}
        return attention.mean(dim=1), heads

    def receive(layer: int, reduced: tuple[torch.Tensor, dict[LayerHeads, torch.Tensor]]) -> None:
        attention, heads = reduced
        means.receive(layer, attention)
        recorder.latest.head_maps.update(heads)

    def head_forward(hidden: torch.Tensor, run_head: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        latest = recorder.latest

        def keep(name: str) -> HeadRows:
            targets = latest.batch.answer_targets() if name == "answer" else None
            return HeadRows(hidden[latest.batch.places(name)], targets, host.head(model), run_head)

        latest.head = {name: keep(name) for name in needs.head}
        if needs.log_probs:
            answers = latest.head.get("answer") or keep("answer")
            weight, bias = answers.weights
            latest.log_probs = answer_log_probs(answers.hidden, weight, answers.targets, bias=bias)
        return hidden.new_zeros(hidden.shape[0], 1, 1) if on_head is None else on_head(latest)

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = run(*args, **kwargs)
        latest = recorder.latest
        if needs.groups and latest.batch.visual_index.shape[1]:
            latest.maps = {tuple(group): mean for group, mean in zip(means.groups, means.means, strict=True)}
        if on_head is not None:
            latest.returned = outputs.logits
        return outputs if on_end is None else on_end(latest)

    capture = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(record_merge(model, begin, embed_once=padding_free))
        stack.enter_context(at_head(model, head_forward))
        layers = sorted(by_head.union(means.layers))
        if layers:
            heads = {layer: "all" if layer in by_head else "mean" for layer in layers}
            options = {"impl": impl, "receive": receive, "reduce": reduce, "heads": heads}
            taps = capture_visual_attention(model, layers, lambda: recorder.latest.batch, **options)
            capture = stack.enter_context(taps)
            capture.detach = not needs.graph
        for layer, rows in sorted(needs.hidden):
            module = host.decoder_layers(model)[max(layer, 0)]
            stack.enter_context(_keep_hidden(module, recorder, (layer, rows)))
        if padding_free:
            stack.enter_context(without_padding(model, lambda: recorder.latest.batch))
        for layer, router in routers.items():
            stack.callback(setattr, router, "real", None)
            if needs.routing:
                handle = router.register_forward_hook(partial(_keep_routing, recorder, layer))
                stack.callback(handle.remove)
        stack.enter_context(replaced(model, "forward", forward))
        yield recorder


def _keep_routing(recorder: PassRecorder, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
    recorder.latest.routing.setdefault(layer, output)  # not that of a recomputation, as in _keep_hidden


@contextlib.contextmanager
def _keep_hidden(layer: nn.Module, recorder: PassRecorder, key: LayerRows) -> Iterator[None]:
    def keep(states: Any) -> None:
        latest = recorder.latest
        states = states[0] if isinstance(states, tuple) else states
        rows = padded(states, latest.batch)[latest.batch.places(key[1])]
        # Gradient checkpointing runs the layer again in the backward, and has to meet the same operations; what they
        # give then belongs to the recomputation and is not recorded twice.
        latest.hidden.setdefault(key, rows)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        keep(kwargs["hidden_states"] if "hidden_states" in kwargs else args)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        keep(output)

    if key[0] == EMBEDDINGS:
        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = layer.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()

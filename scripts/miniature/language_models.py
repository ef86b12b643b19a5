"""The miniature's base language models: real Qwen2 folders that have never seen an image.

A short text-only pre-training can teach them the vocabulary, the grammar and the form of question and answer; with no
steps a base model is as it was initialised. Their vocabularies are padded beyond the
tokenizer's and differently for student and teacher, as those of Qwen's models are.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .language import QUESTIONS, ask, text_round
from .world import sample_scene

#: As in Qwen2. At short head sizes it also leaves more of the query and key free of rotation, to match by content.
ROPE_THETA = 1_000_000.0


@dataclass(frozen=True)
class LanguageModelSpec:
    """Shape of a base model. ``extra_padding`` adds rows beyond the padded vocabulary, in multiples of 64."""

    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    extra_padding: int = 0
    max_position_embeddings: int = 2048

    def vocab_size(self, tokenizer_size: int) -> int:
        return 64 * math.ceil((tokenizer_size + 1) / 64) + self.extra_padding


STUDENT = LanguageModelSpec()
TEACHER = LanguageModelSpec(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=2,
    num_key_value_heads=2,
    extra_padding=64,
)


@dataclass(frozen=True)
class PretrainSettings:
    """Text-only pre-training; the defaults take about half a minute on one CPU core."""

    steps: int = 60
    batch_size: int = 32
    length: int = 96
    learning_rate: float = 1e-3
    warmup: int = 20
    seed: int = 0


def _config_values(spec: LanguageModelSpec, tokenizer) -> dict:
    return {
        "vocab_size": spec.vocab_size(len(tokenizer)),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        # transformers' 0.02 suits widths of thousands; here attention would start, and stay long, almost flat.
        "initializer_range": spec.hidden_size**-0.5,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen2_config(spec: LanguageModelSpec, tokenizer):
    """A ``Qwen2Config`` of this shape."""
    from transformers import Qwen2Config

    return Qwen2Config(**_config_values(spec, tokenizer), use_sliding_window=False)


def llama_config(spec: LanguageModelSpec, tokenizer):
    """A ``LlamaConfig`` of this shape, for Table 7 and tests of the Llama path."""
    from transformers import LlamaConfig

    return LlamaConfig(**_config_values(spec, tokenizer))


def chat_text(rounds: list[tuple[str, str]]) -> str:
    """Rounds in the template `qwen_qa`."""
    return "".join(f"{question}\nAnswer:{answer}<|endoftext|>" for question, answer in rounds)


def text_stream(rng: np.random.Generator):
    """Endless sentences of the world without its images: conversations about unseen scenes, and bare captions."""
    kinds = tuple(QUESTIONS)
    while True:
        scene = sample_scene(rng)
        if rng.random() < 0.25:
            yield ask("caption", scene, rng)[1] + "<|im_end|>\n"
        elif rng.random() < 0.1:
            yield chat_text([text_round(rng) for _ in range(3)])
        else:
            yield chat_text([ask(kinds[int(i)], scene, rng) for i in rng.permutation(len(kinds))[:4]])


def pretrain_text(model, tokenizer, settings: PretrainSettings, progress: bool = True) -> list[float]:
    """Next-token training on packed sequences from :func:`text_stream`; returns the loss of every step."""
    import torch
    from tqdm import trange

    torch.manual_seed(settings.seed)
    stream = text_stream(np.random.default_rng([settings.seed, 21]))
    buffer: list[int] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    losses = []
    model.train()
    bar = trange(settings.steps, desc="text pre-training", disable=not progress)
    for step in bar:
        done = (step + 1 - settings.warmup) / max(1, settings.steps - settings.warmup)
        scale = (step + 1) / settings.warmup if step < settings.warmup else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * max(scale, 0.05)
        need = settings.batch_size * settings.length
        while len(buffer) < need:
            buffer += tokenizer(next(stream)).input_ids
        batch = torch.tensor(buffer[:need]).view(settings.batch_size, settings.length)
        buffer = buffer[need:]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


def build_language_model(
    out: str | Path,
    tokenizer_path: str | Path,
    spec: LanguageModelSpec = STUDENT,
    settings: PretrainSettings | None = None,
    progress: bool = True,
    family: str = "qwen2",
) -> dict[str, float]:
    """Initialise, pre-train on text and save model and tokenizer to the folder ``out``; returns a short report.

    Args:
        family: qwen2 or llama.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

    from llava_compodistill import compat

    settings = settings or PretrainSettings()
    out = Path(out)
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path))
    torch.manual_seed(settings.seed)
    if family == "llama":
        model = LlamaForCausalLM(llama_config(spec, tokenizer))
    else:
        model = Qwen2ForCausalLM(qwen2_config(spec, tokenizer))
    losses = pretrain_text(model, tokenizer, settings, progress)
    model.save_pretrained(out)
    compat.make_config_portable(out)
    # The files themselves, not tokenizer.save_pretrained: each transformers version would write its own dialect.
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (out / name).write_bytes((Path(tokenizer_path) / name).read_bytes())
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": model.config.vocab_size,
        "first_loss": losses[0] if losses else None,
        "last_loss": sum(losses[-10:]) / len(losses[-10:]) if losses else None,
    }
    world = {"spec": asdict(spec), "settings": asdict(settings), "report": report}
    (out / "world.json").write_text(json.dumps(world, indent=1))
    return report

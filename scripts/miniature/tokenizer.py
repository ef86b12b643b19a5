"""A small byte-level BPE tokenizer for the miniature world, saved as a Qwen2-style Hugging Face folder.

The folder holds ``vocab.json`` and ``merges.txt`` (read by the slow class of transformers 4.x), ``tokenizer.json``
(read by the fast class and by transformers 5) and ``tokenizer_config.json``. Like Qwen's there is no BOS token; a turn
ends with ``<|im_end|>``, which is the EOS token, and padding is ``<|endoftext|>``, so the two are never confused.

Every word of the world is one token, alone and with a leading space; any other text falls back to bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .language import QUESTIONS, ask, text_round, vocabulary
from .world import sample_scene

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_end|>"
MAX_LENGTH = 2048

# Qwen2's pre-tokenisation: contractions, words with their leading space, single digits, punctuation, line breaks.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The words around the questions in the usual conversation templates (ChatML, and LLaVA's v1).
_TEMPLATE_TEXTS = (
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "Answer the questions. USER: ASSISTANT: USER: ASSISTANT:",
    "\nAnswer:",
)


def world_texts(rounds: int = 2_000, seed: int = 0) -> list[str]:
    """Questions and answers of every kind over freshly drawn scenes (without held-out combinations)."""
    rng = np.random.default_rng([seed, 7])
    texts = []
    for _ in range(max(1, rounds // (len(QUESTIONS) + 1))):
        scene = sample_scene(rng)
        for kind in QUESTIONS:
            texts += ask(kind, scene, rng)
        texts += text_round(rng)
    return texts


def train_tokenizer(out: str | Path, texts: Iterable[str] | None = None, vocab_size: int = 1024) -> Path:
    """Train on ``texts`` (default: :func:`world_texts`) and the vocabulary, and save the folder ``out``.

    ``vocab_size`` is an upper limit; training stops earlier, once every word is a single token. With the default texts
    the result is always the same.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Each word alone and after a space, whatever the texts happen to contain.
    words = [form for w in vocabulary() for form in (w, f" {w}")]
    corpus = [*(world_texts() if texts is None else texts), *_TEMPLATE_TEXTS, *words]
    tokenizer.train_from_iterator(corpus, trainer)
    # After training, so that the special tokens get the ids after the vocabulary, as in Qwen's tokenizers.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return _save(tokenizer, Path(out))


def _save(tokenizer, out: Path) -> Path:
    from llava_compodistill import compat

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD_TOKEN,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    compat.make_tokenizer_portable(out)
    return out

"""Every difference between library versions, and nothing else.

Supported: transformers 4.37.2 (LLaVA's own generation) and 5.x; both are tested. The versions between go through the
same branches. Each shim names what changed and when it can go.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_PATTERN

logger = logging.getLogger(__name__)

TRANSFORMERS = Version(transformers.__version__)
#: The releases that every test runs on; those between go through the same branches.
TESTED_TRANSFORMERS = ("4.37.2", "5.18.0")

#: transformers 5.18 dropped --warmup_ratio: --warmup_steps below 1 is a ratio there.
HAS_WARMUP_RATIO = "warmup_ratio" in transformers.TrainingArguments.__dataclass_fields__
#: transformers 4.46 renamed --evaluation_strategy to --eval_strategy, 5.0 dropped the old name.
HAS_EVALUATION_STRATEGY = "evaluation_strategy" in transformers.TrainingArguments.__dataclass_fields__
#: Since 4.46 the Trainer collects the micro-batches of one optimizer step before it runs them.
COLLECTS_ACCUMULATION_WINDOW = Version("4.46") <= TRANSFORMERS
#: Since 4.38 the Trainer's shuffling depends on seed and epoch alone; before, on the global random state, so that a
#: run resumed in its second epoch, or on another number of processes, saw another order.
SEEDS_SAMPLER = "accelerator_config" in transformers.TrainingArguments.__dataclass_fields__
#: Why decoder layers cannot be compiled one by one: since 4.48 a tap is a function that attention looks up, and since
#: torch 2.5 all layers of a model share their code.
UNCOMPILED = None if Version("4.48") <= TRANSFORMERS else f"transformers 4.48 or newer, and this is {TRANSFORMERS}"
if Version(torch.__version__) < Version("2.5"):
    UNCOMPILED = f"torch 2.5 or newer, and this is {torch.__version__}"
#: Before 4.46 weights of 8 and 4 bits need CUDA, whatever bitsandbytes has kernels for.
QUANTISES_WITHOUT_CUDA = Version("4.46") <= TRANSFORMERS
#: Since 4.48 attention is a function looked up by name at every call; before, a class fixed at construction.
try:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError:
    ALL_ATTENTION_FUNCTIONS = None


# --------------------------------------------------------------------------------------------------------------------
# Importing LLaVA
# --------------------------------------------------------------------------------------------------------------------
def check_transformers() -> None:
    """Refuse a transformers that cannot work; say once when it is none of the tested ones.

    Raises:
        ImportError: naming the release and the way out.
    """
    oldest = Version(TESTED_TRANSFORMERS[0])
    if TRANSFORMERS < oldest:
        raise ImportError(
            f"transformers {TRANSFORMERS} is too old: llava_compodistill needs {oldest} (LLaVA's own generation) or "
            f"newer, and is tested with {' and '.join(TESTED_TRANSFORMERS)}."
        )
    if transformers.__version__ not in TESTED_TRANSFORMERS:
        _say_once(f"transformers {TRANSFORMERS} is not one of the tested releases ({', '.join(TESTED_TRANSFORMERS)}).")


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def prepare_for_llava_train() -> None:
    """Give transformers back the names that LLaVA 1.2.2's trainer imports from it."""
    import transformers.trainer  # half a second that evaluation need not wait for

    # The layers that LLaVA's optimizer spares from weight decay: moved to pytorch_utils in 4.4x, removed in 5.0; in
    # 4.37 only Llama's norm is among them.
    known = getattr(transformers.trainer, "ALL_LAYERNORM_LAYERS", [nn.LayerNorm])
    norms = [norm for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm) if norm not in known]
    transformers.trainer.ALL_LAYERNORM_LAYERS = [*known, *norms]


def translate_training_arguments(args: Any) -> None:
    """Map the older spellings that LLaVA's scripts use to the installed transformers, before its own checks run."""
    if not HAS_WARMUP_RATIO and args.warmup_ratio:
        if not 0 <= args.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {args.warmup_ratio}: must be at least 0 and below 1.")
        if not args.warmup_steps:
            args.warmup_steps = args.warmup_ratio
    if not HAS_EVALUATION_STRATEGY and args.evaluation_strategy is not None:
        args.eval_strategy = args.evaluation_strategy


def dtype_argument(dtype: torch.dtype | None) -> dict[str, Any]:
    """The keyword of `from_pretrained` that sets the precision: `torch_dtype` became `dtype` in 4.56."""
    return {"dtype" if TRANSFORMERS >= Version("4.56") else "torch_dtype": dtype}


def tokenizer_argument(tokenizer: Any) -> dict[str, Any]:
    """The Trainer's keyword for the tokenizer: `tokenizer` became `processing_class` in 4.46, and went in 5.0."""
    modern = "processing_class" in inspect.signature(transformers.Trainer.__init__).parameters
    return {"processing_class" if modern else "tokenizer": tokenizer}


def make_config_portable(folder: str | os.PathLike) -> None:
    """Add to a folder's config.json the keys under which transformers 4.x looks for what 5.x saves elsewhere.

    Without `rope_theta` a model saved by 5.x would run in LLaVA's generation with the default base of its rotary
    embedding, and say nothing (Qwen's is a hundred times larger).
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary:
        config.setdefault("rope_theta", rotary["rope_theta"])
    if config.get("dtype"):
        config.setdefault("torch_dtype", config["dtype"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_tokenizer_portable(folder: str | os.PathLike, sentencepiece: str | os.PathLike | None = None) -> None:
    """Add to a tokenizer's folder what the slow classes of transformers 4.x read, which LLaVA loads (use_fast=False).

    5.x saves a tokenizer.json and a short tokenizer_config.json, whatever the tokenizer was made from. A folder
    without tokenizer.json was saved by a slow class and stays as it is; so does a kind without a slow class here.

    Args:
        folder: of Qwen2's kind of tokenizer, or of Llama's.
        sentencepiece: the model file that a tokenizer of Llama's kind was made from; 4.x needs a copy of it.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        return
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if _is_qwen2_tokenizer(state):
        config["tokenizer_class"] = "Qwen2Tokenizer"  # 5.x can have loaded it as its own TokenizersBackend
        model = state["model"]
        # tokenizers >= 0.20 writes merges as pairs, which the releases that go with transformers 4.37 cannot read;
        # every release reads the older "left right" form.
        model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
        (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *model["merges"]]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif config.get("tokenizer_class") == "LlamaTokenizer":
        if sentencepiece and os.path.isfile(sentencepiece) and not (folder / "tokenizer.model").exists():
            shutil.copyfile(sentencepiece, folder / "tokenizer.model")
        # 5.x forgets this: whether a text after a special token begins with a space.
        config.setdefault("legacy", (state["pre_tokenizer"] or {}).get("prepend_scheme") != "first")
    else:
        return
    # 4.x looks for the added tokens here alone. Those without a role of their own are special to it if they are in a
    # list, which 5.x has renamed (it reads both names).
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in state["added_tokens"]}
    config.setdefault("added_tokens_decoder", added)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    listed = config.get("additional_special_tokens") or []
    known = [*listed, *(config.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad"))]
    special = [token["content"] for token in state["added_tokens"] if token["special"]]
    config["additional_special_tokens"] = [*listed, *(token for token in special if token not in known)]
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _is_qwen2_tokenizer(state: dict[str, Any]) -> bool:
    """Whether a tokenizer.json does what the slow Qwen2Tokenizer does: byte-level BPE on NFC text, cut as Qwen's."""
    steps = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    return (
        state["model"].get("type") == "BPE"
        and state["normalizer"] == {"type": "NFC"}
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and patterns == [QWEN2_PATTERN]
    )


# --------------------------------------------------------------------------------------------------------------------
# Attention (record/taps.py intervenes in it, by one way or the other)
# --------------------------------------------------------------------------------------------------------------------
def attention_implementation(model: nn.Module) -> str:
    """Name of the attention backend that a model runs: flash_attention_2, sdpa or eager."""
    return getattr(model.config, "_attn_implementation", None) or "eager"


def sliding_window(config: Any, layer: int) -> int | None:
    """How many keys a decoder layer sees at most; None for a layer that sees them all.

    Newer configs name each layer's kind. Before, it depends on the backend: eager attention has the window in every
    layer, whatever `use_sliding_window` says; SDPA in none; flash attention where it is
    switched on, with Qwen2 in the layers below `max_window_layers`.
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return window if kinds[layer] == "sliding_attention" else None
    if ALL_ATTENTION_FUNCTIONS is not None:  # Mistral: one window for all layers
        return window
    backend = getattr(config, "_attn_implementation", None) or "eager"
    if backend == "flash_attention_2":
        below = getattr(config, "max_window_layers", None)
        return window if getattr(config, "use_sliding_window", True) and (below is None or layer < below) else None
    return window if backend == "eager" else None


# --------------------------------------------------------------------------------------------------------------------
# Trainer
# --------------------------------------------------------------------------------------------------------------------
def divides_by_accumulation(trainer: transformers.Trainer) -> bool:
    """Whether the training loop divides the returned loss by the number of micro-batches of a step.

    Before 4.46 accelerate and DeepSpeed always do. Since then nobody does for a loss that was normalised over the
    whole step, which `model_accepts_loss_kwargs` declares.
    """
    return not COLLECTS_ACCUMULATION_WINDOW


def ends_window(trainer: transformers.Trainer) -> bool:
    """Before 4.46, asked inside a micro-batch: whether the training loop will make an optimizer step after it."""
    if trainer.accelerator.sync_gradients:
        return True
    # An epoch of fewer micro-batches than a step accumulates ends with a step, which accelerate does not know of.
    state = trainer.accelerator.gradient_state
    loader = state.active_dataloader
    return loader is not None and state.end_of_dataloader and len(loader) <= trainer.args.gradient_accumulation_steps


@contextlib.contextmanager
def without_rotation(trainer: transformers.Trainer) -> Iterator[None]:
    """Inside, a trainer that saves deletes no older checkpoint: a method of its own, a function since 5.0."""
    module = transformers.trainer
    function = getattr(module, "rotate_checkpoints", None)
    if hasattr(transformers.Trainer, "_rotate_checkpoints"):
        trainer._rotate_checkpoints = lambda *args, **kwargs: None
    if function is not None:
        module.rotate_checkpoints = lambda *args, **kwargs: None
    try:
        yield
    finally:
        trainer.__dict__.pop("_rotate_checkpoints", None)
        if function is not None:
            module.rotate_checkpoints = function


@contextlib.contextmanager
def reads_own_rng_state() -> Iterator[bool]:
    """Let torch read the rng_state.pth that the Trainer has written, which holds NumPy's state beside tensors, without
    running code from it. False where torch (before 2.5) can only read it as any pickle.

    Remove when transformers 4.37 goes: newer releases do this themselves.
    """
    if not hasattr(torch.serialization, "safe_globals"):
        yield False
        return
    core = getattr(numpy, "_core", None) or numpy.core
    needed = [core.multiarray._reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
    with torch.serialization.safe_globals(needed):
        yield True


def fsdp_version(args: Any) -> tuple[int, str]:
    """The version of FSDP that `--fsdp` starts, and what keeps it from being the second. (accelerate 1.6 has FSDP2;
    transformers knows of it by `fsdp_plugin_args`, where it has become the default.)"""
    plugin = getattr(args, "fsdp_plugin_args", None)
    if plugin is None:
        return 1, f"transformers {TRANSFORMERS} starts no other; 5.18 does"
    if Version(accelerate.__version__) < Version("1.6"):
        return 1, f"accelerate {accelerate.__version__} has no other; 1.6 has"
    return plugin.get("fsdp_version", 1), "the version in --fsdp_config"


def hands_out_windows(trainer: transformers.Trainer) -> bool:
    """Whether the loop asks `get_batch_samples` for all micro-batches of a step before it runs them (4.46)."""
    return COLLECTS_ACCUMULATION_WINDOW


# --------------------------------------------------------------------------------------------------------------------
# DeepSpeed
# --------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def outside_zero3() -> Iterator[None]:
    """Load a model whole although the run uses ZeRO-3.

    Under a ZeRO-3 config every `from_pretrained` partitions what it loads, and a teacher without an engine of its own
    would never be gathered again.
    """
    try:
        from transformers.integrations import deepspeed as integration
    except ImportError:
        from transformers import deepspeed as integration
    reference = getattr(integration, "_hf_deepspeed_config_weak_ref", None)
    config = reference() if reference is not None else None
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


@contextlib.contextmanager
def gathered(parameters: list[torch.nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Inside the context the parameters are whole, also under ZeRO-3, where all ranks have to enter it.

    Args:
        modify: keep what rank 0 writes into them.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


def output_capturing_repair() -> tuple[str, str, Callable] | None:
    """(module, symbol, replacement) for transformers 5's output capturing, or None where there is none.

    Asked for attentions or hidden states, a model hooks its submodels too, also those that have hooked themselves
    before. A vision tower that has run once then returns every hidden state twice, so that "the last but one" is the
    last layer's, without a word. (In 5.18. Remove when `install_all_output_capturing_hooks` looks at its own mark.)
    """
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return None
    original = getattr(output_capturing, "install_all_output_capturing_hooks", None)
    if original is None or getattr(original, "repaired", False):
        return None

    def install_once(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not getattr(model, "_output_capturing_hooks_installed", False):
            original(model, *args, **kwargs)

    install_once.repaired = True
    return output_capturing.__name__, "install_all_output_capturing_hooks", install_once


# ---------------------------------------------------------------------------------------------------------------------
# Vision towers
# ---------------------------------------------------------------------------------------------------------------------
class VisionLevel(nn.Module):
    """The level `vision_model` that transformers 5 has taken out of CLIP's and SigLIP's vision models. The names of
    the weights in LLaVA's checkpoints have it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vision_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.vision_model(*args, **kwargs)

    @property
    def config(self) -> Any:
        return self.vision_model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_model.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_model.device


def with_vision_level(model: nn.Module) -> nn.Module:
    """A CLIP or SigLIP vision model whose weights have the names that LLaVA's checkpoints give them."""
    return model if hasattr(model, "vision_model") else VisionLevel(model)


def keep_names_argument() -> dict[str, Any]:
    """The keyword of `save_pretrained` by which weights are saved under the names that they have in the model.

    transformers 5 gives them back the names of the checkpoint that they came from; under ZeRO-3 also where it has
    renamed none, so that a vision tower's would have the level `vision_model` twice (5.18).
    """
    known = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    return {"save_original_format": False} if "save_original_format" in known else {}


# ---------------------------------------------------------------------------------------------------------------------
# Key/value caches: tuples in 4.37, objects later
# ---------------------------------------------------------------------------------------------------------------------
def read_cache(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values) [B, H_kv, N, d] of each layer of a model's `past_key_values`."""
    if isinstance(cache, tuple):
        return list(cache)
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


def make_cache(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """`past_key_values` for a model's forward. A forward may extend it in place."""
    if Version("4.48") > TRANSFORMERS:
        return tuple(pairs)
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(pairs):
        cache.update(keys, values, layer)
    return cache

"""Loading LLaVA checkpoints by what their config says, on any device and in any precision.

LLaVA's `load_pretrained_model` decides by the last folder's name, shrinks padded vocabularies and is bound to fp16 on
CUDA. This one takes its place for the model types in `language_models`. Nothing here runs code from a checkpoint's
folder, and what LLaVA's own loader would run is refused instead of being handed over to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from transformers import AutoConfig, AutoTokenizer

from ... import compat
from ...errors import CheckpointError
from ..files import read_object
from .language_models import MODEL_CLASSES, model_class
from .lora import resize_vocabulary
from .model import has_own_tower, holds_weights, llava_core
from .quantization import leave_out_unfit_kernels, quantization_config, refuse_without_bitsandbytes
from .tower_folders import find_tower
from .weights import loading, portable_lora_config, read_tensors, read_weights, refuse_broken_weights

ADAPTER_FILE = "mm_projector.bin"
LORA_EXTRA_FILE = "non_lora_trainables.bin"


def checkpoint_kind(path: str) -> str:
    """What a local folder holds: full, lora, adapter (mm_projector.bin alone) or base (a language model).

    Raises:
        CheckpointError: naming the folder and what it lacks.
    """
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is not a folder.")
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise CheckpointError(f"{path} has no config.json: it is not a finished checkpoint.")
    names = os.listdir(path)
    if "adapter_config.json" in names:
        return "lora"
    if not has_weights(path):
        if ADAPTER_FILE in names:
            return "adapter"
        raise CheckpointError(f"{path} has a config.json but no weights: training may have stopped before saving.")
    return "full" if _type_in(path).startswith("llava") else "base"


def has_weights(path: str) -> bool:
    """Whether a local folder holds the weights of a language model or of a LoRA."""
    names = os.listdir(path)
    return any(name.endswith((".safetensors", ".index.json")) or name.startswith("pytorch_model") for name in names)


def read_config(path: str) -> Any:
    """The config of a checkpoint (folder or hub name), read without running code that its `auto_map` names.

    Raises:
        CheckpointError: for an architecture that the installed transformers and the plugin do not have, and for a
            folder's config.json that is missing, damaged, or holds what no model can be made of.
        OSError: when there is none under a name on the hub.
    """
    name = os.path.join(path, "config.json")
    if os.path.isdir(path):
        _type_in(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        if isinstance(error, OSError) and not os.path.isdir(path):
            raise
        if isinstance(error, (ValueError, KeyError)):
            raise CheckpointError(
                f"{path}: transformers and LLaVA have no model of the type in its config.json, and code that comes "
                f"with a checkpoint (auto_map) is never run here. ({error})"
            ) from error
        raise CheckpointError(f"{name}: no model can be made of it ({type(error).__name__}: {error}).") from error


def read_tokenizer(path: str, **options: Any) -> Any:
    """The slow tokenizer of a checkpoint (folder or hub name), as LLaVA loads it, without running code from there.

    Raises:
        CheckpointError: when the tokenizer is code in the folder, or its files there are missing or damaged.
        OSError, ValueError: as transformers says when a name on the hub holds none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, use_fast=False, trust_remote_code=False, **options)
    except Exception as error:
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{path}: its tokenizer_config.json names code in the folder (auto_map), which is never run here. "
                "Save the tokenizer as one of transformers' own classes."
            ) from error
        if isinstance(error, ImportError) or not os.path.isdir(path):
            raise
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({type(error).__name__}: {error}).") from error


def read_lora_config(path: str) -> dict[str, Any]:
    """adapter_config.json of a LoRA checkpoint.

    Raises:
        CheckpointError: when it is missing, no JSON object, or names its base by no text.
    """
    file = os.path.join(path, "adapter_config.json")
    values = read_object(file, CheckpointError)
    base = values.get("base_model_name_or_path")
    if not isinstance(base, (str, type(None))):
        raise CheckpointError(f"{file}: base_model_name_or_path must be a text, and is {base!r:.60}.")
    return values


def load_lora_weights(model: torch.nn.Module, folder: str) -> None:
    """Load the LoRA and adapter weights of a LoRA checkpoint into a PeftModel, in the precision it holds them in.

    Raises:
        CheckpointError: when the adapter does not fit.
    """
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, read_tensors(folder, "adapter_model"))
    load_extra_weights(llava_core(model), os.path.join(folder, LORA_EXTRA_FILE))


def load_extra_weights(model: torch.nn.Module, path: str) -> None:
    """Load the weights beside the language model's (the adapter) and insist that all of them found their place.

    Under ZeRO-3 all ranks call it: `from_pretrained` has partitioned the adapter with the rest.

    Raises:
        CheckpointError: when the file's names and the model's do not agree, which LLaVA's strict=False would hide.
    """
    weights = read_weights(path)
    names = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    expected = {name for name in model.state_dict() if "mm_projector" in name}
    unknown = sorted(set(names) - set(model.state_dict()))
    missing = sorted(expected - set(names))
    if unknown or missing:
        raise CheckpointError(
            f"{path} does not fit the model in config.json: "
            + "; ".join(f"{what} {found[:3]}" for what, found in (("unknown", unknown), ("missing", missing)) if found)
        )
    parameters = [parameter for name, parameter in model.named_parameters() if name in names]
    try:
        with compat.gathered(parameters, modify=True):
            model.load_state_dict(names, strict=False)
    except RuntimeError as error:  # shapes
        raise CheckpointError(f"{path} does not fit the model in config.json: {error}") from error


def load_model(
    path: str, base: str | None = None, merge_lora: bool = True, vision_tower: str | None = None, **kwargs: Any
) -> torch.nn.Module:
    """Load a LLaVA model of any checkpoint kind, without its tokenizer, and without the vision tower's weights where
    the checkpoint has none of its own (`trained_towers`).

    Args:
        path: a full, LoRA or adapter checkpoint, or the hub name of a full one.
        base: the language model under a LoRA or adapter checkpoint. A LoRA names its own when this is None.
        merge_lora: fold LoRA weights into the language model, as LLaVA does; else return a trainable PeftModel.
        vision_tower: the encoder to use when the folder that the checkpoint names is not on this machine.
        **kwargs: for `from_pretrained`.
    """
    kind = checkpoint_kind(path) if os.path.isdir(path) else "full"
    config = read_config(path)
    cls = model_class(config.model_type)
    if kind in ("lora", "adapter") and hasattr(config, "quantization_config"):
        del config.quantization_config  # how its language model was held in training (QLoRA), not how it is stored
    find_tower(config, path, vision_tower)
    if kind in ("full", "base"):
        if not isinstance(config, cls.config_class):
            values = config.to_dict()
            values.pop("model_type")
            with loading(path):
                config = cls.config_class(**values)
        return _from_pretrained(cls, path, config, **kwargs)
    if kind == "lora" and base is None:
        base = read_lora_config(path).get("base_model_name_or_path")
    if base is None:
        raise CheckpointError(
            f"{path} holds {'a LoRA' if kind == 'lora' else 'an adapter'} only: name its language model "
            "(--model-base)."
        )
    extra = os.path.join(path, LORA_EXTRA_FILE if kind == "lora" else ADAPTER_FILE)
    new = ["mm_projector", "image_newline"]
    if any("vision_tower" in name for name in read_weights(extra)):
        new.append("vision_tower")
    vocabulary = config.vocab_size
    config.vocab_size = getattr(read_config(base), "vocab_size", vocabulary)
    described = os.path.join(path, "config.json")
    model = _from_pretrained(cls, base, config, new=tuple(new), described=described, **kwargs)
    resize_vocabulary(model, vocabulary)
    load_extra_weights(model, extra)
    if kind == "lora":
        with loading(path):
            model = _with_lora(model, path, trainable=not merge_lora)
            if merge_lora:
                model = model.merge_and_unload()
    return model


def _with_lora(model: torch.nn.Module, path: str, trainable: bool) -> torch.nn.Module:
    from peft import PeftModel

    config = portable_lora_config(read_lora_config(path), os.path.join(path, "adapter_config.json"))
    read_tensors(path, "adapter_model")  # PEFT does not name a damaged file, and old releases run what a pickle hides
    return PeftModel.from_pretrained(model, path, is_trainable=trainable, config=config)


def _from_pretrained(
    cls: type, path: str, config: Any, new: tuple[str, ...] = (), described: str = "", **kwargs: Any
) -> torch.nn.Module:
    """`from_pretrained` that insists on every weight but those of the `new` modules, where transformers would start
    from random ones and warn. `described` is the config's file, where it lies elsewhere than the weights."""
    generation = os.path.join(path, "generation_config.json")
    if os.path.isfile(generation):
        read_object(generation, CheckpointError)  # transformers takes anything for one
    with loading(path, described), _expecting_missing_weights() if new else contextlib.nullcontext():
        model, info = cls.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    elsewhere = new if has_own_tower(config) else (*new, "vision_tower")
    missing = sorted(name for name in info["missing_keys"] if not any(part in name for part in elsewhere))
    # Weights that a module has no place for, such as another architecture's biases, would change what it does.
    modules = dict(model.named_modules())
    unfit = sorted(name for name in info["unexpected_keys"] if holds_weights(modules.get(name.rpartition(".")[0])))
    if unfit:
        raise CheckpointError(
            f"{path} has {len(unfit)} weights that a {cls.__name__} has no place for, such as {', '.join(unfit[:3])}: "
            f"its config.json names another architecture (model_type {config.model_type})."
        )
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} weights of a {cls.__name__}, such as {', '.join(missing[:3])}: it is "
            f"incomplete, or its config.json names another architecture (model_type {config.model_type})."
        )
    own = [entry for entry in model.named_parameters() if not any(part in entry[0] for part in elsewhere)]
    refuse_broken_weights(own, path)
    if "quantization_config" in kwargs:
        leave_out_unfit_kernels(model)
    return model


@contextlib.contextmanager
def _expecting_missing_weights() -> Iterator[None]:
    """Inside the context transformers does not warn of weights that are missing and nothing else: the adapter's, which
    are loaded next. A report that also names unknown or unfitting weights is shown whole."""

    def is_worth_showing(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "newly initialized" not in text or "UNEXPECTED" in text or "MISMATCH" in text

    logger = logging.getLogger(transformers.modeling_utils.__name__)
    logger.addFilter(is_worth_showing)
    try:
        yield
    finally:
        logger.removeFilter(is_worth_showing)


def dispatching_loader(original: Callable[..., tuple]) -> Callable[..., tuple]:
    """LLaVA's `load_pretrained_model`, dispatching on config.model_type instead of the folder's name."""

    def load_pretrained_model(
        model_path,
        model_base,
        model_name,
        load_8bit=False,
        load_4bit=False,
        device_map="auto",
        device="cuda",
        use_flash_attn=False,
        **kwargs,
    ):
        kind = _model_type(model_path)
        if kind not in {f"llava_{name}" for name in MODEL_CLASSES} | {"llava"}:
            _check_for_llava(model_path, model_base, model_name, kind)
            return original(
                model_path,
                model_base,
                model_name,
                load_8bit,
                load_4bit,
                device_map=device_map,
                device=device,
                use_flash_attn=use_flash_attn,
                **kwargs,
            )
        if device == "cuda" and not torch.cuda.is_available():
            warnings.warn("No CUDA device: the model is loaded on the CPU.", stacklevel=2)
            device = "cpu"
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
        kwargs.update(compat.dtype_argument(dtype))
        if device == "cuda" or load_8bit or load_4bit:
            # Without a device map transformers 4.37 leaves new weights on the meta device when one of the same size is
            # loaded: it takes them for tied.
            kwargs["low_cpu_mem_usage"] = True
            kwargs["device_map"] = device_map if device == "cuda" else {"": device}
        if load_8bit or load_4bit:
            refuse_without_bitsandbytes(f"load_{4 if load_4bit else 8}bit", device)
            kwargs["quantization_config"] = quantization_config(4 if load_4bit else 8, dtype)
        if use_flash_attn:
            kwargs["attn_implementation"] = "flash_attention_2"
        model = load_model(model_path, model_base, **kwargs).eval()
        if "device_map" not in kwargs:
            model.to(device)
        has_tokenizer = any(os.path.isfile(os.path.join(model_path, name)) for name in TOKENIZER_FILES)
        source = model_path if has_tokenizer or model_base is None else model_base
        tokenizer = read_tokenizer(source)
        add_image_tokens(model, tokenizer)
        suppress_padded_vocabulary(model, tokenizer)
        tower = model.get_vision_tower()
        if tower is None:
            raise CheckpointError(f"{os.path.join(model_path, 'config.json')}: it names no mm_vision_tower.")
        if not tower.is_loaded:
            with loading(tower.vision_tower_name):
                tower.load_model(device_map=device_map if kwargs.get("device_map") == "auto" else None)
        if kwargs.get("device_map") != "auto":
            tower.to(device=device, dtype=dtype)
        context = getattr(model.config, "max_sequence_length", 2048)
        return tokenizer, model, tower.image_processor, context

    return load_pretrained_model


TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def add_image_tokens(model: torch.nn.Module, tokenizer: Any) -> None:
    """Add LLaVA's image markers to a tokenizer; the vocabulary grows where needed and never shrinks."""
    add_marker_tokens(model.config, tokenizer)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # ZeRO-3 gives weights no shape
        model.resize_token_embeddings(len(tokenizer))


def add_marker_tokens(config: Any, tokenizer: Any) -> None:
    """Add those of LLaVA's image markers to a tokenizer that a model's config asks for."""
    if getattr(config, "mm_use_im_patch_token", False):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)


def suppress_padded_vocabulary(model: torch.nn.Module, tokenizer: Any) -> None:
    """Keep generation from embedding rows that pad the vocabulary: they are no tokens, and cannot be decoded."""
    padded = list(range(len(tokenizer), model.get_input_embeddings().num_embeddings))
    if padded:
        model.generation_config.suppress_tokens = padded


def _model_type(path: str) -> str:
    """`model_type` of a checkpoint; of a folder it is read as text, since transformers may not know the type."""
    if not os.path.isdir(path):
        return read_config(path).model_type
    return _type_in(path)


def _type_in(folder: str) -> str:
    """`model_type` in a folder's config.json, empty where there is none."""
    path = os.path.join(folder, "config.json")
    kind = read_object(path, CheckpointError).get("model_type", "")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path}: model_type must be a text, is {kind!r:.60}.")
    return kind


def _check_for_llava(path: str, base: str | None, name: str, model_type: str) -> None:
    """Refuse what LLaVA's own loader would run code for. That loader goes by the name: with "mpt" in it, it trusts
    remote code; with "llava" and a base model it unpickles `.bin` files.

    Raises:
        CheckpointError: naming the folder and the reason.
    """
    for folder in (path, base):
        for file in ("config.json", "tokenizer_config.json"):
            there = folder is not None and os.path.isfile(os.path.join(folder, file))
            if there and "auto_map" in read_object(os.path.join(folder, file), CheckpointError):
                raise CheckpointError(
                    f"{os.path.join(folder, file)} names code in the folder (auto_map), which is never run here "
                    f"(model_type {model_type!r})."
                )
    name = name.lower()
    if model_type == "llava_mpt" and "llava" in name and base is None:
        return
    if "llava" in model_type or "llava" in name:
        known = ", ".join(sorted(f"llava_{known}" for known in MODEL_CLASSES))
        raise CheckpointError(f"{path}: model_type {model_type!r} in its config.json is no LLaVA model ({known}).")
    if "mpt" in name:
        raise CheckpointError(
            f'{path}: by the letters "mpt" in its name LLaVA\'s own loader takes it for MPT, and would run code that '
            "comes with it. Rename the folder."
        )

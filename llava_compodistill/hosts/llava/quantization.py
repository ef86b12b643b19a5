"""Weights of 8 and 4 bits, by bitsandbytes: whether it can run here, and what it is told."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ... import compat
from ...errors import FlagError

#: Modules that keep their precision: the head, whose weight losses read, and what is LLaVA's. Current transformers
#: compares whole names, and 4.37 looks for these anywhere in a name.
KEPT = ("model.mm_projector", "model.vision_tower", "lm_head")


def refuse_without_bitsandbytes(flag: str, device: torch.device | str) -> None:
    """Refuse weights of 8 or 4 bits where they cannot be loaded, before anything is.

    Args:
        flag: what asks for them, as it was written.

    Raises:
        FlagError: naming the flag, what is missing and the way out.
    """
    kind = torch.device(device).type
    try:
        package = importlib.import_module("bitsandbytes")
    except ImportError:
        raise FlagError(
            f"{flag}: needs bitsandbytes, which is not installed: pip install 'llava-compodistill[quant]', or leave "
            "the flag out."
        ) from None
    known = getattr(package, "supported_torch_devices", {"cuda"})  # older releases have kernels for CUDA alone
    if kind not in known or (kind != "cuda" and not compat.QUANTISES_WITHOUT_CUDA):
        raise FlagError(
            f"{flag}: bitsandbytes {getattr(package, '__version__', '')} and transformers {compat.TRANSFORMERS} "
            f"cannot quantise on a {kind.upper()}: use a GPU, or leave the flag out."
        )


def quantization_config(bits: int, dtype: torch.dtype, quant_type: str = "nf4", double_quant: bool = True) -> Any:
    """transformers' description of quantised weights.

    Args:
        bits: 8 (LLM.int8) or 4.
        dtype: in which 4-bit layers compute.
        quant_type: of 4 bits, nf4 or fp4 (LLaVA's --quant_type).
        double_quant: whether the scales of 4 bits are quantised, too (LLaVA's --double_quant).
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
        llm_int8_skip_modules=list(KEPT),
    )


def leave_out_unfit_kernels(model: torch.nn.Module) -> None:
    """Layers of 4 bits whose widths do not fit bitsandbytes' packed kernels for CPUs (0.50: multiples of 64 in, of 32
    out) take its general ones; it would stop in the first forward."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            fits = module.in_features % 64 == 0 and module.out_features % 32 == 0
            module.support_avx512bf16_for_cpu = fits

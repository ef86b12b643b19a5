"""`llava-compodistill merge CHECKPOINT OUTPUT`: a LoRA student as a whole checkpoint, which loads without PEFT and
without the language model that the LoRA was trained on.

The sum is computed in float32 on the unquantised language model, also for a LoRA that was trained on a quantised one
(QLoRA), and rounded once, to --dtype.
"""

from __future__ import annotations

import argparse
import glob
import logging
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..errors import CheckpointError, CompoDistillError, DiskError, OutputError
from ..hosts import disk
from ..hosts.files import is_path
from ..hosts.llava import register
from ..hosts.llava.model import has_own_tower
from . import checkpoint, manifest
from .mix import MANIFEST_FILE
from .resume import CALIBRATION_FILE, RUN_FILE

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
#: What a tokenizer may consist of.
TOKENIZER_PARTS = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
#: What a checkpoint of ours has beside weights, config and tokenizer.
KEPT_FILES = (CALIBRATION_FILE, RUN_FILE, MANIFEST_FILE)


def merge(path: str, output: str, base: str | None = None, dtype: str | None = None) -> Path:
    """Merge a LoRA checkpoint into its language model, and write the whole model to a new folder.

    Args:
        path: the LoRA checkpoint, of this package or of LLaVA.
        output: a folder that does not exist yet. It appears when everything is in it.
        base: the language model under the LoRA, where it is not where adapter_config.json says.
        dtype: of the weights written: one of DTYPES; that of the checkpoint's config.json when None.

    Returns:
        The folder.

    Raises:
        CheckpointError: when `path` is no LoRA checkpoint, the language model is not there, or they do not fit.
        OutputError: when the folder is there already, or cannot be written.
        DiskError: when it would not fit on the disk.
    """
    from ..hosts.llava.loader import load_model, read_config, read_lora_config

    target = Path(output)
    if target.exists():
        raise OutputError(f"{output} is there already: name a new folder, which is never written over.")
    _check_kind(path)
    content = read_lora_config(path)
    base = _find_base(path, base, content.get("base_model_name_or_path"))
    register()
    _refuse_tied(path, read_config(path), content)
    precision = _dtype_of(read_config(path), dtype)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}.") from error
    try:
        model = load_model(path, base, **compat.dtype_argument(torch.float32))
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} and {base} do not make a model: {error}") from error
    model.to(precision)
    _check_space(model, target)
    temporary = _unfinished(target)
    try:
        with disk.explained(str(target.parent), then="nothing of this one is left"):
            checkpoint.save_whole(model, str(temporary))
            _copy(Path(path), Path(base), temporary)
            manifest.flush(temporary)
            os.rename(temporary, target)
    except CompoDistillError:
        raise
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("%s: a whole model in %s, from the LoRA in %s and %s.", target, str(precision)[6:], path, base)
    return target


def _unfinished(target: Path) -> Path:
    """The folder that is filled and then renamed. Those of killed processes, of a model's size, are removed."""
    host = socket.gethostname()
    for path in target.parent.glob(f".{glob.escape(target.name)}.merging-{glob.escape(host)}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and not _runs(int(number)):
            logger.warning("Removed %s, which a merge that was killed has left.", path)
            shutil.rmtree(path, ignore_errors=True)
    return target.with_name(f".{target.name}.merging-{host}-{os.getpid()}")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _check_kind(path: str) -> None:
    from ..hosts.llava.loader import LORA_EXTRA_FILE, checkpoint_kind

    kind = checkpoint_kind(path)
    if kind != "lora":
        holds = {"full": "a whole model already", "adapter": "an adapter alone", "base": "a language model"}[kind]
        raise CheckpointError(f"{path} holds {holds}: there is no LoRA to merge.")
    if not os.path.isfile(os.path.join(path, LORA_EXTRA_FILE)):
        raise CheckpointError(f"{path} has no {LORA_EXTRA_FILE}: it is no LoRA checkpoint of LLaVA's, or incomplete.")


def _find_base(path: str, given: str | None, named: Any) -> str:
    """The language model under a LoRA: a folder, or a name that transformers resolves."""
    from ..hosts.llava.loader import checkpoint_kind, read_config

    base = given or named
    source = "--base" if given else f"{os.path.join(path, 'adapter_config.json')}, base_model_name_or_path:"
    if not base:
        raise CheckpointError(f"{source} is empty: name the language model that the LoRA was trained on, with --base.")
    if os.path.isdir(base):
        kind = checkpoint_kind(base)
        if kind in ("lora", "adapter"):
            raise CheckpointError(f"{source} {base} holds {'a LoRA' if kind == 'lora' else 'an adapter'} itself.")
    elif is_path(base):
        raise CheckpointError(
            f"{source} {base} is not there: name the folder or hub name of this machine with --base."
        )
    try:
        config = read_config(base)
    except OSError as error:
        raise CheckpointError(f"{source} {base} cannot be read: name its folder with --base. ({error})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{source} {base} is stored quantised: name the unquantised language model with --base.")
    return base


def _refuse_tied(path: str, config: Any, content: dict[str, Any]) -> None:
    from ..hosts.llava.loader import read_tensors

    if not getattr(config, "tie_word_embeddings", False):
        return
    touched = sorted(n for n in read_tensors(path, "adapter_model") if "lm_head" in n or "embed_tokens" in n)
    if touched:
        raise CheckpointError(
            f"{path}: the LoRA changes {touched[0]}, and the language model uses one matrix for embedding and head "
            "(tie_word_embeddings): merging would change both."
        )


def _dtype_of(config: Any, asked: str | None) -> torch.dtype:
    if asked is not None:
        return getattr(torch, asked)
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "float32"
    return stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored).removeprefix("torch."))


def _check_space(model: nn.Module, target: Path) -> None:
    whole = has_own_tower(model.config)  # an encoder that was trained is saved, too
    kept = (p for name, p in model.named_parameters() if whole or "vision_tower" not in name)
    needed = sum(p.numel() * p.element_size() for p in kept)
    free = shutil.disk_usage(target.absolute().parent).free
    if free < needed:
        raise DiskError(
            f"{target}: the merged model needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free. Free "
            "some space, or name another folder."
        )


def _copy(source: Path, base: Path, target: Path) -> None:
    """The tokenizer, which a checkpoint of LLaVA's may have left with its language model, and how it was trained."""
    from ..hosts.llava.loader import TOKENIZER_FILES, read_tokenizer

    has_tokenizer = any((source / name).is_file() for name in TOKENIZER_FILES)
    if not has_tokenizer and not base.is_dir():
        read_tokenizer(str(base)).save_pretrained(target)
        compat.make_tokenizer_portable(target)
    for name in TOKENIZER_PARTS:
        origin = (source if has_tokenizer else base) / name
        if origin.is_file():
            shutil.copyfile(origin, target / name)
    for name in KEPT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="llava-compodistill merge",
        description="Merge a LoRA student (QLoRA as well) into its language model and write a whole checkpoint.",
    )
    parser.add_argument("checkpoint", help="the folder of the LoRA student")
    parser.add_argument("output", help="the folder to write, which must not exist")
    parser.add_argument("--base", help="the language model that it was trained on (default: the one that it names)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision of the weights written (default: that in its config.json)"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llava_compodistill").setLevel(logging.INFO)
    merge(options.checkpoint, options.output, options.base, options.dtype)
    return 0

"""Checkpoints in LLaVA's shapes, each complete enough to stand without the teacher.

pt, dpt        config.json + mm_projector.bin
dft, sft full  a Hugging Face folder (safetensors)
dft, sft LoRA  adapter_config.json + adapter_model.safetensors + non_lora_trainables.bin + config.json

Beside them lie the tokenizer, compodistill_run.json, the settings that they were made with (see `resume`), and
calibration.json, where terms have measured something before training (see `calibration`).
config.json has an entry `compodistill`: the stage, the version of this package and, for dft and sft, the conversation
template to evaluate with.

LLaVA's own saver keeps trainable parameters only, so a frozen teacher adapter would be lost and its loader's
strict=False would hide it; here the adapter is always saved whole.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..about import __version__
from ..errors import CheckpointError, DiskError
from ..hosts.llava.model import has_own_tower, llava_core
from . import manifest
from .resume import write_description
from .sharding import whole

logger = logging.getLogger(__name__)

ADAPTER_FILE = "mm_projector.bin"
LORA_EXTRA_FILE = "non_lora_trainables.bin"


def save(
    model: nn.Module,
    output_dir: str,
    args: Any,
    tokenizer: Any = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter: dict[str, torch.Tensor] | None = None,
    modules: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint of the kind that the stage calls for.

    Args:
        model: the student, wrapped in PEFT or not.
        state_dict: gathered weights, where the trainer has them (DeepSpeed, FSDP); else they are read from the model.
        adapter, modules: what `adapter_weights` and `module_weights` give, which under ZeRO-3 and FSDP all ranks have
            to call; else they are called here.

    Raises:
        CheckpointError: when DeepSpeed was not asked to gather the weights.
    """
    if state_dict is not None and not state_dict:
        raise CheckpointError('ZeRO-3 gathered no weights: set "stage3_gather_16bit_weights_on_model_save" to true.')
    from ..hosts.llava.templates import current_template

    os.makedirs(output_dir, exist_ok=True)
    core = llava_core(model)
    adapter = adapter_weights(model) if adapter is None else adapter
    modules = module_weights(model) if modules is None else modules
    if modules:
        torch.save(modules, os.path.join(output_dir, MODULES_FILE))
    core.config.compodistill = {"method": args.method, "stage": args.stage, "version": __version__}
    if args.stage not in ("pt", "dpt"):
        # An adapter is trained under `plain`, in which nothing can be asked: it would mislead an evaluation.
        core.config.compodistill["template"] = current_template()
    if args.stage in ("pt", "dpt"):
        torch.save(_prefixed("model.", adapter), os.path.join(output_dir, ADAPTER_FILE))
        _save_config(core, output_dir)
    elif hasattr(model, "peft_config"):
        names = [n for n, p in model.named_parameters() if "lora_" in n or _trained_bias(n, p)]
        source = dict(model.named_parameters()) if state_dict is None else state_dict
        weights = {name: _copy(source[name]) for name in names}
        # Left to itself PEFT reads the base's config, to see whether the embedding has grown, and warns of its type.
        model.save_pretrained(output_dir, state_dict=weights, save_embedding_layers=False)
        torch.save(_prefixed("base_model.model.model.", adapter), os.path.join(output_dir, LORA_EXTRA_FILE))
        _save_config(core, output_dir)
    else:
        save_whole(core, output_dir, state_dict)
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)
        compat.make_tokenizer_portable(output_dir, sentencepiece=getattr(tokenizer, "vocab_file", None))
    torch.save(args, os.path.join(output_dir, "training_args.bin"))
    if getattr(args, "made_with", None) is not None:
        write_description(output_dir, args.made_with, getattr(args, "save_only_model", False))


def save_whole(core: nn.Module, output_dir: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a whole model and its config, as LLaVA and transformers load it.

    Args:
        core: without wrappers.
        state_dict: its weights, where they are not read from the model.
    """
    weights = core.state_dict() if state_dict is None else state_dict
    weights = {name: value for name, value in weights.items() if not _elsewhere(name, core)}
    core.save_pretrained(output_dir, state_dict=weights, **compat.keep_names_argument())
    _save_config(core, output_dir)


def save_sealed(trainer: Any, save: Callable[[], None]) -> None:
    """Save `checkpoint-N` of the step at hand, put it on the disk and seal it, and only then delete older ones.

    Args:
        trainer: on all ranks.
        save: writes the folder (transformers', which also puts the trainer's state there).
    """
    args, wait = trainer.args, trainer.accelerator.wait_for_everyone
    folder = Path(args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if args.should_save and folder.exists():
        shutil.rmtree(folder)  # damaged, or the run would have gone on from it: nothing of it is to be sealed
    wait()
    with compat.without_rotation(trainer):
        save()
    wait()
    if args.local_process_index == 0 and args.process_index != 0 and folder.exists():
        manifest.flush(folder)  # what this machine has written
    wait()
    if args.should_save:
        manifest.seal(folder, whole=args.verify_checkpoints)
    wait()  # with --save_on_each_node: a checkpoint that all machines have is there at any time
    if args.should_save:
        _rotate(folder, args.save_total_limit, trainer.state.best_model_checkpoint)
    wait()


def _rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beside a new one. Those of later steps go first: they are damaged, or the run
    would not have come here."""
    if limit is None or limit <= 0:
        return
    step = int(newest.name.removeprefix("checkpoint-"))
    others = {path: path.name.removeprefix("checkpoint-") for path in newest.parent.glob("checkpoint-*")}
    others = {path: int(name) for path, name in others.items() if name.isdecimal() and path.is_dir()}
    kept = [newest] + [path for path in others if best and path.name == Path(best).name and path != newest]
    earlier_last = sorted(others, key=lambda path: (others[path] > step, -others[path]))
    kept += [path for path in earlier_last if path not in kept][: max(0, limit - len(kept))]
    for path in others:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


#: Where the terms' own trained weights hang on a student, and the file that they are saved in.
MODULES = "distillation"
MODULES_FILE = "distillation.bin"


def attach_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Hang the terms' own weights on the student, so that wrappers, optimizers and devices find them there."""
    if modules:
        llava_core(model).add_module(MODULES, nn.ModuleDict(modules))


def module_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The terms' own weights by name. Under ZeRO-3 and FSDP all ranks call it."""
    attached = getattr(llava_core(model), MODULES, None)
    parameters = {} if attached is None else dict(attached.named_parameters())
    with compat.gathered(list(parameters.values())):
        return {name: _copy(parameter) for name, parameter in parameters.items()}


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights by name ("mm_projector. ..."), frozen part included. Under ZeRO-3 and FSDP all ranks
    call it."""
    parameters = dict(llava_core(model).get_model().mm_projector.named_parameters())
    with compat.gathered(list(parameters.values())):
        return {f"mm_projector.{name}": _copy(parameter) for name, parameter in parameters.items()}


def saves_trained_alone(model: nn.Module, args: Any) -> bool:
    """Whether a checkpoint of this run holds what is trained, and not the whole language model."""
    return args.stage in ("pt", "dpt") or hasattr(model, "peft_config")


def _elsewhere(name: str, core: nn.Module) -> bool:
    """Whether a weight of a student has no place in its checkpoint's own files."""
    # LLaVA loads a frozen encoder from `mm_vision_tower`; a copy here would be dead weight.
    frozen = "vision_tower" in name and not has_own_tower(core.config)
    return frozen or name.startswith(f"{MODULES}.")


def load_into(model: nn.Module, folder: str) -> None:
    """Load the weights of a checkpoint into a model of the same kind, to resume training.

    Raises:
        CheckpointError: when the folder's kind or names do not fit the model.
    """
    from ..hosts.llava.loader import checkpoint_kind, load_extra_weights, load_lora_weights, read_weights

    kind = checkpoint_kind(folder)
    core = llava_core(model)
    is_peft = hasattr(model, "peft_config")
    if (kind == "lora") != is_peft:
        raise CheckpointError(
            f"{folder} holds {kind} weights, which do not fit a {'LoRA' if is_peft else 'full'} model."
        )
    if kind == "adapter":
        load_extra_weights(core, os.path.join(folder, ADAPTER_FILE))
    elif kind == "lora":
        load_lora_weights(model, folder)
    else:
        _load_full(core, folder)
    attached = getattr(core, MODULES, None)
    if attached is not None:
        attached.load_state_dict(read_weights(os.path.join(folder, MODULES_FILE)))


def check_disk_space(model: nn.Module, args: Any) -> None:
    """Stop before training when the checkpoints cannot fit on the disk, beside those that are there already.

    Raises:
        DiskError: with the space needed, the space free, and the folder.
    """
    core = llava_core(model)
    if saves_trained_alone(model, args):
        frozen = [p for p in core.get_model().mm_projector.parameters() if not p.requires_grad]
        weights = _size([p for p in model.parameters() if p.requires_grad] + frozen)
    else:
        own = has_own_tower(core.config)
        weights = _size([p for n, p in model.named_parameters() if own or "vision_tower" not in n])
    needed = weights
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
        # Adam's two moments; ZeRO writes the fp32 copy of the weights as well.
        moments = 4 * (3 if getattr(args, "deepspeed", None) else 2)
        optimizer = moments * sum(_count(p) for p in model.parameters() if p.requires_grad)
        each = weights + (0 if getattr(args, "save_only_model", False) else optimizer)
        limit = args.save_total_limit or 1
        needed += (limit + 1) * each  # a new checkpoint is written before an old one is deleted
        present = sum(folder_size(folder) for folder in Path(args.output_dir).glob("checkpoint-*"))
        needed -= min(present, limit * each)
    folder = Path(args.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"--output_dir {args.output_dir}: the checkpoints need about {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free. Free some space, lower --save_total_limit, or name another folder."
        )


def report_leftovers(output_dir: str) -> None:
    """At the end of training, name the checkpoints that were kept for resuming, and how to delete them."""
    folders = sorted(path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    if folders:
        logger.info(
            "The result is in %s. %s (%.2f GiB, optimizer state included) stays beside it: only a run with more steps "
            "would need it (--resume_anyway True). To free the space: rm -r %s",
            output_dir,
            ", ".join(path.name for path in folders),
            sum(folder_size(path) for path in folders) / 2**30,
            " ".join(str(path) for path in folders),
        )


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _count(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves a partitioned one empty


def _size(parameters: list[nn.Parameter]) -> int:
    return sum(_count(parameter) * parameter.element_size() for parameter in parameters)


def _prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def _copy(weight: torch.Tensor) -> torch.Tensor:
    return whole(weight.detach()).cpu().clone()


def _trained_bias(name: str, parameter: torch.Tensor) -> bool:
    return (
        name.endswith("bias") and parameter.requires_grad and "mm_projector" not in name and f"{MODULES}." not in name
    )


def _save_config(core: nn.Module, output_dir: str) -> None:
    use_cache = core.config.use_cache
    core.config.use_cache = True  # off while training only
    # How a QLoRA student holds its base: a checkpoint fits the unquantised one as well.
    quantised = vars(core.config).pop("quantization_config", None)
    try:
        core.config.architectures = [type(core).__name__]
        core.config.save_pretrained(output_dir)
        compat.make_config_portable(output_dir)
        if core.generation_config is not None:
            core.generation_config.save_pretrained(output_dir)
    finally:
        core.config.use_cache = use_cache
        if quantised is not None:
            core.config.quantization_config = quantised


def _load_full(core: nn.Module, folder: str) -> None:
    from ..hosts.llava.loader import read_tensors

    shards = sorted(path for path in Path(folder).glob("model*.safetensors"))
    if not shards:
        shards = sorted(Path(folder).glob("pytorch_model*.bin"))
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        weights.update(read_tensors(folder, shard.stem))
    names = set(core.state_dict())
    missing, unexpected = sorted(names - set(weights)), sorted(set(weights) - names)
    tied = set() if not core.config.tie_word_embeddings else {"lm_head.weight"}
    missing = [name for name in missing if not _elsewhere(name, core) and name not in tied]
    if missing or unexpected:
        raise CheckpointError(f"{folder} does not fit the model: missing {missing[:3]}, unknown {unexpected[:3]}.")
    core.load_state_dict(weights, strict=False)

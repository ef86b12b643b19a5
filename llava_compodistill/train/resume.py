"""Going on with a run that was killed: which checkpoint is whole, and whether it comes from the same command.

Every checkpoint holds `compodistill_run.json`, the settings that its weights depend on, and a manifest of its files. A
command with other settings is refused in a folder that has a checkpoint or the result of a finished run.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..pair.placement import QUANTISED
from . import manifest
from .cache.settings import digest
from .cache.shards import SETTINGS_FILE, read_settings
from .mix import Source, read_sources
from .pickles import refuse_unknown

logger = logging.getLogger(__name__)

RUN_FILE = "compodistill_run.json"
CALIBRATION_FILE = "calibration.json"  # see `calibration`

#: Flags of LLaVA and of this package that do not change what is learned: where things lie, how they are computed,
#: what is logged, and what happens to samples that cannot be read. All others count, among them `check_images` and
#: `allow_outside_images`: with `--bad_samples skip` they decide which samples there are.
WITHOUT_EFFECT = {
    "attention_map_impl",
    "attn_implementation",
    "bad_samples",
    "blind",
    "cache_dir",
    "compile_layers",
    "evaluation_strategy",
    "image_folder",
    "is_multimodal",
    "lazy_preprocess",
    "measure_attention",
    "mpt_attn_impl",
    "padding_free",
    "remove_unused_columns",
    "resume_anyway",
    "sight_samples",
    "sight_steps",
    "trust_checkpoint",
    "verify_checkpoints",
}
#: The flags of transformers that do.
OF_TRANSFORMERS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "dataloader_drop_last",
    "fp16",
    "group_by_length",
    "label_smoothing_factor",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "neftune_noise_alpha",
    "num_train_epochs",
    "optim_args",
    "seed",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
)
#: Flags whose value may be a path, written in more than one way.
_PATHS = {
    "data_path",
    "model_name_or_path",
    "pretrain_mm_mlp_adapter",
    "skip_samples",
    "teacher_cache",
    "teacher_model_base",
    "teacher_model_path",
    "vision_tower",
}


def describe(model_args: Any, data_args: Any, args: Any) -> dict[str, Any]:
    """What a run's weights depend on: flags by name, the samples of an optimizer step, and the size of the data.

    The number of processes counts by way of `global_batch` alone.
    """
    values: dict[str, Any] = {}
    for group in (model_args, data_args, args):
        values |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    ordinary = {field.name for field in dataclasses.fields(transformers.TrainingArguments)} - {"optim"}
    kept = {
        name: _plain(name, value)
        for name, value in values.items()
        if name not in WITHOUT_EFFECT and (name not in ordinary or name in OF_TRANSFORMERS)
    }
    if not args.lora_enable:
        kept = {name: value for name, value in kept.items() if not name.startswith("lora_") or name == "lora_enable"}
    if args.teacher_placement not in QUANTISED:  # the others move the same weights about
        kept["teacher_placement"] = "whole weights"
    kept["optim"] = kept["optim"].removesuffix("_fused")  # the same steps
    if model_args.teacher_cache and Path(model_args.teacher_cache, SETTINGS_FILE).is_file():
        # Another one may have been made in its place. (That there is none is said where it is opened.)
        kept["teacher_cache_made"] = digest(read_settings(Path(model_args.teacher_cache)))
    kept["deepspeed"] = bool(args.deepspeed)
    kept["global_batch"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    sources = read_sources(data_args.data_path)
    if sources == [Source(data_args.data_path)]:
        if os.path.isfile(data_args.data_path):
            kept["data_bytes"] = os.path.getsize(data_args.data_path)
    else:
        kept["data_files"] = [
            [_plain("data_path", source.path), source.weight, source.image_folder, _size(source.path)]
            for source in sources
        ]
    return json.loads(json.dumps(kept))


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _plain(name: str, value: Any) -> Any:
    if name in _PATHS and value is not None and os.path.exists(value):
        return os.path.realpath(value)
    if isinstance(value, enum.Enum):
        value = value.value
    return value if isinstance(value, (str, int, float, list, dict, type(None))) else str(value)


def write_description(folder: str | os.PathLike, run: dict[str, Any], save_only_model: bool) -> None:
    """Leave the settings of a run beside its weights."""
    content = {"settings": run, "save_only_model": save_only_model, "transformers": transformers.__version__}
    text = json.dumps(content, indent=2, sort_keys=True)
    (Path(folder) / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def checkpoint_to_resume(
    output_dir: str,
    run: dict[str, Any],
    anyway: bool = False,
    verify: bool = False,
    trusted: bool = False,
) -> str | None:
    """The checkpoint that a run goes on from: the newest whole one in its folder, None where there is none.

    Args:
        run: what `describe` gives for the command at hand.
        anyway: go on in spite of different settings.
        verify: compare the hashes of whole files.
        trusted: go on although files run code when they are loaded.

    Raises:
        CheckpointError: naming each setting that was different when the checkpoint was made, or the code in its files.
    """
    folder = last_complete(output_dir, verify)
    if folder is not None:
        accept(folder, run, anyway, verify, trusted)
    return folder


def accept(folder: str, run: dict[str, Any], anyway: bool, verify: bool, trusted: bool) -> None:
    """Refuse a whole checkpoint of other settings, or with code in its files. Arguments and errors as above."""
    if not manifest.is_sealed(folder):
        logger.warning(
            "%s was saved by an earlier release, without a manifest: only its files' form is checked.", folder
        )
    elif verify and not manifest.has_whole_hashes(folder):
        logger.warning("%s was saved without --verify_checkpoints True: only its files' ends are checked.", folder)
    refuse_unknown(Path(folder), trusted)
    if not os.path.isfile(os.path.join(folder, RUN_FILE)):
        logger.warning(
            "%s was saved by an earlier release: whether it was made with this command's settings cannot be checked.",
            folder,
        )
        return
    content = _read_json(Path(folder) / RUN_FILE)
    if content.get("save_only_model"):
        logger.warning("%s holds no state of the optimizer (--save_only_model): it starts from zero.", folder)
    lines = _differences(content["settings"], run)
    if not lines:
        return
    if not anyway:
        raise CheckpointError(
            f"{folder} was made with other settings:\n{lines}\nTo resume that run, use its settings; to "
            "start a new one, choose another --output_dir; to resume in spite of the difference, add --resume_anyway "
            "True."
        )
    logger.warning("%s was made with other settings (--resume_anyway):\n%s", folder, lines)


def is_finished(output_dir: str, run: dict[str, Any]) -> bool:
    """Whether a folder holds the result of this very command, trained to its end, whose checkpoints are gone.

    Args:
        run: what `describe` gives for the command at hand.

    Raises:
        CheckpointError: when it is the result of other settings, naming each; training would replace it.
    """
    folder = Path(output_dir)
    try:
        state = _read_json(folder / "trainer_state.json")
        settings = _read_json(folder / RUN_FILE).get("settings")
        _read_json(folder / "config.json")
        for path in _weight_files(folder):
            _check_file(path)
    except _Damaged:
        return False  # or of an earlier release, which left no settings here
    steps, last = state.get("global_step"), state.get("max_steps")
    if not isinstance(settings, dict) or not isinstance(steps, int) or not isinstance(last, int) or steps < last:
        return False
    lines = _differences(settings, run)
    if lines:
        raise CheckpointError(
            f"{output_dir} holds the result of a finished run with other settings:\n{lines}\nChoose another "
            "--output_dir, or remove the folder if its result is not needed."
        )
    return True


def _differences(made_with: dict[str, Any], run: dict[str, Any]) -> str:
    apart = [name for name in sorted(run) if name in made_with and made_with[name] != run[name]]
    return "\n".join(f"  {name}: {made_with[name]!r} there, {run[name]!r} in this command" for name in apart)


def last_complete(output_dir: str, verify: bool = False) -> str | None:
    """The newest `checkpoint-N` that is whole, or None. The others are named with their damage and passed over.

    Args:
        verify: compare the hashes of whole files.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    folders = [path for path, step in steps.items() if step.isdecimal()]
    for folder in sorted(folders, key=lambda path: int(steps[path]), reverse=True):
        problem = damage(folder, verify)
        if problem is None:
            return str(folder)
        logger.warning("%s is incomplete (killed while saving?) and is passed over: %s.", folder, problem)
    if folders:
        logger.warning("No checkpoint in %s is whole: training begins at the first step.", output_dir)
    return None


def name_missing_states(folder: str, args: Any) -> None:
    """Say what a run cannot take from its checkpoint: ranks' random states, and the scale of fp16's losses."""
    names = ["rng_state.pth"]
    if args.world_size > 1:
        ranks = [args.process_index] if args.save_on_each_node else range(args.world_size)
        names = [f"rng_state_{rank}.pth" for rank in ranks]
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        logger.warning(
            "%s has no %s (another number of processes?): what these draw, such as dropout, is not what the unbroken "
            "run would have drawn.",
            *(folder, ", ".join(missing)),
        )
    if args.fp16 and not args.deepspeed and not os.path.isfile(os.path.join(folder, "scaler.pt")):
        logger.warning("%s has no scaler.pt: the scale of fp16's losses is found anew, and steps are skipped.", folder)


def damage(folder: Path, verify: bool = False) -> str | None:
    """What keeps a checkpoint from being resumed: a missing, torn or unreadable file; None when it is whole.

    Without a manifest (see `manifest`) the formats tell by their ends whether they were written to the end.

    Args:
        verify: compare the hashes of whole files.
    """
    if manifest.is_sealed(folder):
        problem = manifest.find_damage(folder, verify)
        if problem is not None:
            return problem
    try:
        state = _read_json(folder / "trainer_state.json")  # the trainer writes it last
        for name in ("global_step", "max_steps"):
            if not isinstance(state.get(name), int):
                return f"trainer_state.json has no {name}"
        _read_json(folder / "config.json")
        with_optimizer = False
        if (folder / RUN_FILE).is_file():
            run = _read_json(folder / RUN_FILE)
            if not isinstance(run.get("settings"), dict):
                return f"{RUN_FILE} has no settings"
            with_optimizer = not run.get("save_only_model") and state["global_step"] < state["max_steps"]
        if (folder / CALIBRATION_FILE).is_file():
            _read_json(folder / CALIBRATION_FILE)
        for path in _weight_files(folder):
            _check_file(path)
        if with_optimizer and not any(folder.glob("global_step*")):  # DeepSpeed's, which hold all of it
            if not any(folder.glob("optimizer*")):
                return "optimizer.pt is missing"
            _check_file(folder / "scheduler.pt")
        for path in [*folder.rglob("*.pt"), *folder.glob("*.pth"), *folder.glob("distillation.bin")]:
            _check_file(path)
    except _Damaged as problem:
        return str(problem)
    return None


class _Damaged(Exception):
    """A file of a checkpoint is missing or torn; the text names it."""


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "adapter_config.json").exists():
        _read_json(folder / "adapter_config.json")
        tensors = folder / "adapter_model.bin"  # of older releases of PEFT
        if not tensors.exists():
            tensors = folder / "adapter_model.safetensors"
        return [tensors, folder / "non_lora_trainables.bin"]
    if (folder / "mm_projector.bin").exists():
        return [folder / "mm_projector.bin"]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{name}.index.json").exists():
            shards = _read_json(folder / f"{name}.index.json").get("weight_map")
            if not isinstance(shards, dict):
                raise _Damaged(f"{name}.index.json has no weight_map")
            return sorted({folder / str(shard) for shard in shards.values()})
        if (folder / name).exists():
            return [folder / name]
    raise _Damaged("there are no weights")


def _check_file(path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the file's size
                pass
        else:
            with zipfile.ZipFile(path):  # a torch file; its table of contents stands at the end
                pass
    except FileNotFoundError:
        raise _Damaged(f"{path.name} is missing") from None
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise _Damaged(f"{path.name} is damaged ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _Damaged(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _Damaged(f"{path.name} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise _Damaged(f"{path.name} is damaged (no JSON object)")
    return content

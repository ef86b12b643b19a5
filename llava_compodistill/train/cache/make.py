"""`llava-compodistill cache`: the teacher over a data set, once, in as many processes as there are.

The data are cut into blocks of positions; a block becomes a shard, whoever makes it. So a command that is run again,
on any number of GPUs, makes the blocks that are missing or damaged, and the last process to end writes the index.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset

from ...errors import CompoDistillError, FlagError, NonFiniteModelError, OutputError
from ...hosts.llava import register
from ...hosts.llava.loader import add_marker_tokens
from ...hosts.llava.model import count_visual_tokens
from ...hosts.llava.templates import use_template
from ...pair.placement import SHARDED, place_teacher
from ...pair.student import computing
from ...pair.teacher import load_teacher
from ...record.encoding import encode_alone
from ...record.forward import Needs, record
from .. import lock
from ..arguments import DataArguments, ModelArguments, TrainingArguments
from ..checks import check_arguments, uncached
from ..data import CheckedDataset, make_data_module
from ..output import SHOWN_AFTER
from ..preflight.flags import take_out, without_launcher
from ..rehearsal import rehearse, sketch_student
from ..run import load_tokenizer, teacher_dtype
from ..teacher_text import find_teacher_text
from . import run, shards
from .entries import DIGEST, What, digests, make_entries
from .read import wanted_of
from .settings import refuse_others
from .size import Lengths, check_room, mean_bytes, measure, readable, show_size
from .survey import refuse_other_data, survey

logger = logging.getLogger(__name__)

#: Flags of training that say how its processes share a student, which is not here.
_OF_TRAINING = ("deepspeed", "fsdp", "fsdp_config")
#: Bytes that a shard is to have, about, and the most samples; where there are several processes, shards of each.
SHARD_BYTES, MOST_SAMPLES, LEAST_SHARDS = 256 << 20, 4096, 8


@dataclass(frozen=True)
class Options:
    """What the command has beside training's flags."""

    output: str
    top_k: int = 64
    logit_bits: int = 8
    map_bits: int = 8
    shard_samples: int | None = None
    estimate: bool = False
    also_for: tuple[str, ...] = ()


@dataclass
class Job:
    """All that the command's flags have become."""

    model: ModelArguments
    data: DataArguments
    args: TrainingArguments
    options: Options
    what: What
    dataset: CheckedDataset
    collator: Any
    settings: dict[str, Any]
    patches: int


def parse(flags: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The flags of training, as `train` takes them.

    Raises:
        FlagError: naming those that contradict each other, or that a cache cannot be made with.
    """
    rest, _ = take_out(without_launcher(list(flags)), _OF_TRAINING)
    if not any(flag.partition("=")[0].replace("-", "_") == "__output_dir" for flag in rest):
        rest = [*rest, "--output_dir", os.devnull]
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    try:
        model_args, data_args, args = parser.parse_args_into_dataclasses(args=rest)
        check_arguments(model_args, data_args, args)
    except ValueError as error:
        raise error if isinstance(error, CompoDistillError) else FlagError(str(error)) from None
    why = uncached(args)
    if why is None and model_args.teacher_cache:
        why = f"--teacher_cache {model_args.teacher_cache} is for training: leave it out here"
    if why is None and args.teacher_placement in SHARDED:
        why = f"--teacher_placement {args.teacher_placement}: processes read samples of their own here; use offload"
    if why is not None:
        raise FlagError(f"cache: {why}.")
    return model_args, data_args, args


def prepare(options: Options, flags: Sequence[str]) -> Job:
    """Read everything but the teacher's weights.

    Raises:
        CompoDistillError: for what the user can mend.
    """
    model_args, data_args, args = parse(flags)
    register(train=True)
    template = use_template(model_args.version)
    tokenizer = load_tokenizer(model_args, args, template)
    teacher_text, shared = find_teacher_text(tokenizer, model_args, args)
    terms = rehearse(model_args, args, teacher_text)
    for path in options.also_for:
        terms = [*terms, *rehearse(replace(model_args, model_name_or_path=path), args, teacher_text)]
    teacher = run.look("cache", model_args, terms, teacher_text)
    chosen = {"top_k": options.top_k, "logit_bits": options.logit_bits, "map_bits": options.map_bits}
    what = wanted_of(terms, args, len(tokenizer) if shared is None else shared, **chosen)
    what = replace(what, top_k=min(what.top_k, what.vocab))
    settings = run.describe(what, model_args, data_args, args, tokenizer, teacher)
    student = sketch_student(model_args).config
    add_marker_tokens(student, tokenizer)
    data_args.is_multimodal = True
    data_args.mm_use_im_start_end = bool(getattr(student, "mm_use_im_start_end", False))
    module = make_data_module(tokenizer, data_args, args.seed_of_data)
    dataset = module["train_dataset"]
    dtype, placement = str(teacher_dtype(args)).removeprefix("torch."), args.teacher_placement
    dtype = "float8" if args.teacher_dtype == "float8" else dtype
    settings |= {"samples": len(dataset), "teacher_dtype": dtype}
    settings["quantised"] = placement if placement in ("8bit", "4bit") else "no"
    patches = count_visual_tokens(teacher)
    return Job(model_args, data_args, args, options, what, dataset, module["data_collator"], settings, patches)


# ---------------------------------------------------------------------------------------------------------------------
# Making it
# ---------------------------------------------------------------------------------------------------------------------
def make(options: Options, flags: Sequence[str]) -> None:
    """Make a cache, or go on with one. All processes call it.

    Raises:
        CompoDistillError: for what the user can mend; what is made so far stays.
    """
    job = prepare(options, flags)
    folder, args = Path(options.output), job.args
    first = args.process_index == 0
    lengths = measure(job) if first or options.estimate else []
    if options.estimate:
        if first:
            show_size(job, lengths)
        return
    with contextlib.ExitStack() as held:
        error = pending = None
        if first:
            try:
                held.enter_context(lock.locked(str(folder), "--output", "the cache"))
                pending = begin(job, lengths, folder)
            except CompoDistillError as problem:
                error = problem
        if args.world_size > 1:
            pending, error = broadcast_object_list([pending, error])
        if error is not None:
            raise error
        todo, blocks = pending
        if todo:
            wait_for(folder, args.process_index)
        mine = todo[args.process_index :: args.world_size]
        if mine:
            fill(job, folder, mine, sorted(set(blocks) - set(todo)))
        finish(folder, blocks)


def wait_for(folder: Path, rank: int) -> None:
    """Wait until a process sees the folder of the first one, which a file system may show to other machines late.

    Raises:
        OutputError: when it does not.
    """
    until = time.monotonic() + SHOWN_AFTER
    while not (folder / shards.SETTINGS_FILE).is_file():
        if time.monotonic() > until:
            raise OutputError(
                f"--output {folder} is not the first machine's folder on rank {rank}: name one that all share."
            )
        time.sleep(0.2)


def begin(job: Job, lengths: Sequence[Lengths], folder: Path) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Look at what there is, and say what is to be made: the blocks that are missing, and all of them."""
    show_size(job, lengths)
    each, count = max(1, mean_bytes(lengths, job.what).total), len(job.dataset)
    there = shards.read_settings(folder) if (folder / shards.SETTINGS_FILE).is_file() else None
    size = job.options.shard_samples or (there or {}).get("shard_samples")
    # Enough shards for all processes, of which each makes the same number.
    most = min(MOST_SAMPLES, -(-count // (job.args.world_size * LEAST_SHARDS)) if job.args.world_size > 1 else count)
    settings = {**job.settings, "shard_samples": size or max(1, min(most, int(SHARD_BYTES / each)))}
    if there is not None:
        refuse_others(folder, there, settings)
    blocks = [
        (start, min(start + settings["shard_samples"], count)) for start in range(0, count, settings["shard_samples"])
    ]
    todo, whole = survey(job.dataset, folder, blocks)
    check_room(each, todo, whole, folder)
    for path in folder.glob("*.tmp"):  # of a process that was killed; the lock is ours
        path.unlink()
    if there is None:
        shards.write_settings(folder, settings)
    for block in todo:  # or a process that ends before it is made would take the cache for finished
        (folder / shards.shard_name(*block)).unlink(missing_ok=True)
    if todo:
        (folder / shards.INDEX_FILE).unlink(missing_ok=True)
    logger.info(
        "%d of %d shards are there (%s); %d are to be made.", len(blocks) - len(todo), len(blocks), folder, len(todo)
    )
    return todo, blocks


def finish(folder: Path, blocks: Sequence[tuple[int, int]]) -> None:
    """Write the index where all shards are there: the last process to end does."""
    missing = sum(not (folder / shards.shard_name(*block)).is_file() for block in blocks)
    if missing:
        logger.info("%d shards of %s are being made by other processes; the last to end finishes it.", missing, folder)
        return
    total = shards.write_index(folder, blocks)
    logger.info("%s is finished: %s. Train from it with --teacher_cache %s", folder, readable(total), folder)


def fill(job: Job, folder: Path, blocks: Sequence[tuple[int, int]], whole: Sequence[tuple[int, int]] = ()) -> None:
    """Run the teacher over some blocks, and write each when it is whole.

    Args:
        whole: blocks whose shards are there.
    """
    args = job.args
    teacher = load(job)
    refuse_other_data(job.dataset, folder, whole, job.dataset.read)  # now with pixels
    batches = [batch for block in blocks for batch in batches_of(job, block)]
    loader = DataLoader(
        _Batches(job, batches),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.device.type == "cuda",
    )
    done: dict[int, dict[str, np.ndarray]] = {}
    waiting, started, written, total = list(blocks), time.monotonic(), 0, sum(stop - start for start, stop in blocks)
    for found, batch in loader:
        positions = [position for position, entry in found.items() if entry["sizes"] is None]
        if positions:
            names = ", ".join(map(job.dataset.name_of, positions))
            with _naming(names):
                made = run_teacher(job, teacher, batch)
            for position, entry in zip(positions, made, strict=True):
                found[position] |= entry
        done |= found
        start, stop = waiting[0]
        if len(done) == stop - start:
            path = shards.write_shard(folder, start, [done[position] for position in range(start, stop)])
            written, done = written + stop - start, {}
            waiting.pop(0)
            rate = written / (time.monotonic() - started)
            logger.info(
                "%s: %d of %d samples, %.3g a second, %s a sample, about %.2g h to go.",
                *(path.name, written, total, rate, readable(path.stat().st_size / (stop - start))),
                (total - written) / rate / 3600,
            )


def load(job: Job) -> torch.nn.Module:
    """The teacher, as a training run with these flags would have it."""
    model, args = job.model, job.args
    placement = "replicate" if args.teacher_placement == "auto" else args.teacher_placement
    teacher = load_teacher(
        model.teacher_model_path,
        model.teacher_model_base,
        dtype=teacher_dtype(args),
        device=args.device,
        attn_implementation=model.attn_implementation,
        vision_tower=model.vision_tower,
        placement=placement,
        float8=args.teacher_dtype == "float8",
    )
    place_teacher(teacher, placement, args.device)
    teacher.config.tokenizer_model_max_length = args.model_max_length
    teacher.config.tokenizer_padding_side = "right"
    job.data.image_processor = teacher.get_vision_tower().image_processor
    return teacher


def run_teacher(job: Job, teacher: torch.nn.Module, batch: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """The entries of a batch, without digests."""
    needs = Needs(frozenset({"answer"}) if job.what.answers else frozenset(), frozenset(job.what.groups))
    inputs = {name: _on(job.args.device, value) for name, value in batch.items()}
    with torch.no_grad(), computing(job.args), encode_alone(teacher):
        with record(teacher, needs, impl=job.args.attention_map_impl) as recorder:
            teacher(**inputs, use_cache=False)
            return make_entries(recorder.latest, job.what)


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if torch.is_tensor(value) else [each.to(device) for each in value]


@contextlib.contextmanager
def _naming(names: str) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise NonFiniteModelError(f"{error} in the batch of {names}: nothing can be learned from it.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def batches_of(job: Job, block: tuple[int, int]) -> list[list[int]]:
    """The positions of a block in batches of samples of like lengths, which are padded least."""
    lengths, size = job.dataset.list_data_dict.words, job.args.per_device_train_batch_size
    order = sorted(range(*block), key=lambda position: lengths[position])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _as_it_is(made: Any) -> Any:
    return made


class _Batches(Dataset):
    """Batches as workers make them: ({position: entry}, the samples collated). An entry has the digests of its sample,
    and sizes of None until the teacher has read it; that of a sample that cannot be read is whole."""

    def __init__(self, job: Job, batches: Sequence[Sequence[int]]):
        self.job, self.batches = job, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
        dataset, samples, found = self.job.dataset, [], {}
        for position in self.batches[number]:
            try:
                sample = dataset.read(position)
            except Exception as error:
                cause = dataset.fault(error)
                if cause is None:
                    raise
                dataset.pass_over(position, cause, error)
                nothing = np.zeros(DIGEST, np.uint8)
                found[position] = {
                    "sizes": np.array([-1] * 3, np.int64),
                    "digest.text": nothing,
                    "digest.pixels": nothing,
                }
                continue
            samples.append(sample)
            found[position] = {**digests(sample), "sizes": None}
        return found, self.job.collator(samples) if samples else {}

"""LLaVA's training data, checked before the first step; the file and its samples are in `records`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import DataError, ImageError, SampleError
from ..hosts.llava import training as llava_training
from ..hosts.llava.images import most_pixels, prepared_for
from ..hosts.llava.training import IGNORE_INDEX, DataCollatorForSupervisedDataset, LazySupervisedDataset
from ..pair.tokens import TEACHER
from .cache.read import CacheCollator, TeacherCache
from .mix import Mix, Source, read_sources
from .skip_list import read_skip_list
from .teacher_text import TeacherText, TeacherTextCollator

logger = logging.getLogger(__name__)


class CheckedDataset(LazySupervisedDataset):
    """LLaVA's lazy data set; bad samples are found at the start, and those that hide until they are read name
    themselves.

    Args:
        data_path: JSON file, several with commas, or a YAML mix (`mix`).
        tokenizer: of the student.
        data_args: LLaVA's data arguments with `bad_samples` ("error" or "skip"), `check_images` and
            `allow_outside_images`.
        seed: draws samples where a mix takes a share of a file.
        teacher: how a teacher with another tokenizer reads the samples, which then hold that, too.
        samples: the mix, where it has been read already.
        cache: what the teacher has given for each sample (a `TeacherCache`), which samples then hold.

    Raises:
        DataError: for an unreadable file, or bad samples under "error".
    """

    #: Whether each sample needs a rejected answer.
    paired = False

    def __init__(
        self,
        data_path: str,
        tokenizer: Any,
        data_args: Any,
        seed: int = 0,
        teacher: TeacherText | None = None,
        samples: Mix | None = None,
        cache: TeacherCache | None = None,
    ):
        self.tokenizer, self.teacher, self.cache = tokenizer, teacher, cache
        self.data_args = data_args
        data_args.image_folder = data_args.image_folder or ""
        most_pixels()  # a limit that is none shows now
        if samples is None:
            sources = read_sources(data_path)
            options = data_args.image_folder, data_args.bad_samples, data_args.check_images
            allowed = getattr(data_args, "allow_outside_images", False)
            unwanted = samples_left_out(data_args, sources)
            samples = Mix(sources, *options, seed, self.paired, allowed, unwanted)
        self.list_data_dict = samples
        if cache is not None:
            cache.check_samples(len(samples), self._try)

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, with 128 for an image, as LLaVA counts them."""
        records = self.list_data_dict
        return [words + 128 * image for words, image in zip(records.words, records.with_image, strict=True)]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each sample, negative for those without an image, as LLaVA counts them."""
        records = self.list_data_dict
        return [words if image else -words for words, image in zip(records.words, records.with_image, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            sample = self.usable((index + offset) % len(self))
            if sample is not None:
                return sample
        raise DataError("No sample of the data can be used.")

    def _try(self, position: int) -> None:
        """Read a sample, which may turn out to be one that is passed over, in its turn."""
        try:
            self.read(position)
        except Exception as error:
            if self.fault(error) is None:
                raise

    def usable(self, position: int) -> dict[str, Any] | None:
        """What `read` gives; None for a sample that is passed over.

        Raises:
            DataError: as `pass_over` does.
        """
        try:
            return self.read(position)
        except Exception as error:
            cause = self.fault(error)
            if cause is None:
                raise
            self.pass_over(position, cause, error)
        return None

    def pass_over(self, position: int, cause: str, error: Exception | None = None) -> None:
        """Log a sample that cannot be used.

        Raises:
            DataError: instead, where `bad_samples` is "error".
        """
        record = self.list_data_dict[position]
        message = f"sample {record.get('id', position)!r} (image {record.get('image')!r}): {cause}"
        if self.data_args.bad_samples == "error":
            file = self.list_data_dict.file_of(position)
            message = f"{file}: {message.rstrip('.')}. --bad_samples skip leaves such samples out."
            raise DataError(message) from error
        logger.warning("Skipped %s", message)

    def read(self, position: int) -> dict[str, Any]:
        """LLaVA's sample: input_ids, labels and image; under TEACHER, what a teacher with another tokenizer reads, or
        what one has given that is read from a cache."""
        how = (getattr(self.data_args, name, None) for name in ("image_aspect_ratio", "image_processor"))
        record = self.list_data_dict[position]
        once = copy.copy(self)  # LLaVA's code asks for the record four times, which are as many readings of the file
        once.list_data_dict = {position: record}
        with prepared_for(*how):
            sample = LazySupervisedDataset.__getitem__(once, position)
        known = getattr(self.data_args.image_processor, "always_finite", False)
        if "image" in sample and not known and not bool(torch.isfinite(sample["image"]).all()):
            raise SampleError("its pixels are NaN or infinite after preprocessing")
        if self.cache is not None:
            return {**sample, TEACHER: self.cache.read(position, sample, self.name_of(position))}
        if self.teacher is None:
            return sample
        return {**sample, TEACHER: self.teacher.read(record, sample)}

    def name_of(self, position: int) -> str:
        """How messages call a sample."""
        record = self.list_data_dict[position]
        return f"sample {record.get('id', position)!r} (number {position}, image {record.get('image')!r})"

    def conversation(self, record: dict[str, Any]) -> tuple[list[dict[str, str]], bool]:
        """The turns of a sample as they are tokenized, and whether there is an image."""
        turns, seen = copy.deepcopy(record["conversations"]), "image" in record
        return (llava_training.preprocess_multimodal([turns], self.data_args)[0] if seen else turns), seen

    def read_text(self, position: int) -> dict[str, Any]:
        """What `read` gives of a sample, without its image."""
        record = self.list_data_dict[position]
        turns, seen = self.conversation(record)
        batch = llava_training.preprocess([turns], self.tokenizer, has_image=seen)
        sample = {name: batch[name][0] for name in ("input_ids", "labels")}
        return sample if self.teacher is None else {**sample, TEACHER: self.teacher.read(record, sample)}

    def fault(self, error: Exception) -> str | None:
        """What is wrong with a sample that could not be read; None when the error is not the sample's."""
        if isinstance(error, DataError) and not isinstance(error, ImageError):
            return None
        if isinstance(error, AssertionError):  # LLaVA's own preprocessing, which says no more
            return "the conversation does not have the form that the template asks for"
        if isinstance(error, (SampleError, OSError, ValueError)):
            return str(error)
        return None


class PreferenceDataset(CheckedDataset):
    """Samples with a second, worse answer under `rejected`: each is read with its own last answer and with that one.

        {"id": ..., "image": ..., "conversations": [..., {"from": "gpt", "value": "chosen"}], "rejected": "worse"}

    Args and Raises as for `CheckedDataset`.
    """

    paired = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rejected = copy.copy(self)
        self._rejected.list_data_dict = _WithRejected(self.list_data_dict)

    def read(self, position: int) -> dict[str, Any]:
        """{"chosen": LLaVA's sample, "rejected": the same with the other answer}, labelled at its last answer."""
        return _at_last_answers(super().read(position), CheckedDataset.read(self._rejected, position))

    def read_text(self, position: int) -> dict[str, Any]:
        return _at_last_answers(super().read_text(position), CheckedDataset.read_text(self._rejected, position))


def _at_last_answers(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    found = {"chosen": chosen, "rejected": rejected}
    for sample in found.values():
        for reading in (sample, sample.get(TEACHER)):
            if reading is not None:
                reading["labels"] = last_answer(reading["labels"])
    return found


def samples_left_out(data_args: Any, sources: Sequence[Source]) -> dict[str, dict[int, int]]:
    """What --skip_samples leaves out, by data file."""
    path = getattr(data_args, "skip_samples", None)
    return read_skip_list(path, [source.path for source in sources]) if path else {}


def last_answer(labels: torch.Tensor) -> torch.Tensor:
    """[N] labels, with those before the last answer's replaced by IGNORE_INDEX."""
    gaps = (labels == IGNORE_INDEX).nonzero().flatten()
    labelled = (labels != IGNORE_INDEX).nonzero().flatten()
    if not len(labelled):
        return labels
    before = gaps[gaps < labelled[-1]]
    labels = labels.clone()
    labels[: before[-1] + 1 if len(before) else 0] = IGNORE_INDEX
    return labels


class _WithRejected(Sequence):
    """Records whose last answer is the rejected one."""

    def __init__(self, records: Sequence[dict[str, Any]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        turns = record["conversations"]
        return {**record, "conversations": [*turns[:-1], {**turns[-1], "value": record["rejected"]}]}


class PreferenceCollator:
    """Collates P pairs as 2 P samples, the chosen answers before the rejected ones; single samples as they are.

    Args:
        collator: of single samples.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "chosen" not in samples[0]:  # sight is measured on the chosen answers alone
            return self.collator(samples)
        return self.collator([sample[answer] for answer in ("chosen", "rejected") for sample in samples])


def make_data_module(
    tokenizer: Any,
    data_args: Any,
    seed: int = 0,
    teacher: TeacherText | None = None,
    paired: bool = False,
    cache: TeacherCache | None = None,
) -> dict[str, Any]:
    """The Trainer's data arguments: a checked data set and LLaVA's own collator, one for each tokenizer.

    Args:
        paired: whether samples are pairs of answers.
        cache: as for `CheckedDataset`.
    """
    collator = DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    if teacher is not None:
        collator = TeacherTextCollator(collator, DataCollatorForSupervisedDataset(tokenizer=teacher.tokenizer))
    if cache is not None:
        collator = CacheCollator(collator)
    kind = PreferenceDataset if paired else CheckedDataset
    return {
        "train_dataset": kind(data_args.data_path, tokenizer, data_args, seed, teacher, cache=cache),
        "data_collator": PreferenceCollator(collator) if paired else collator,
    }

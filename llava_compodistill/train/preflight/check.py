"""A check from top to bottom: flags, files, models, lengths, images, verdict."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from ...about import __version__
from ...errors import DataError
from ...hosts.llava import register
from ...hosts.llava.model import count_visual_tokens
from ..data import CheckedDataset, PreferenceDataset, samples_left_out
from ..mix import Mix, Source, read_sources
from ..skip_list import write_skip_list
from . import images, lengths
from .findings import NOTE, SKIPS, STOPS, Findings
from .flags import Parsed, parse, without_launcher
from .manifest import InspectedRecords, read_manifest
from .pair import Models, check_packages, look_at_models
from .processes import progress_bar, usable_cores

READY, SKIPPED, CANNOT = "ready", "ready with samples skipped", "cannot train"
EXIT = {READY: 0, SKIPPED: 1, CANNOT: 2}
#: Samples whose lengths are measured unless --lengths says otherwise: enough for shares of one in a thousand.
MEASURED = 100_000


@dataclass
class Options:
    """What `llava-compodistill check` takes beside the flags of training.

    Attributes:
        measured: samples whose lengths are measured; None for all.
    """

    images: bool = False
    workers: int = field(default_factory=usable_cores)
    measured: int | None = MEASURED
    write_skip: str | None = None
    without_weights: bool = False


@dataclass
class Report:
    """What a check found.

    Attributes:
        counts: files, samples, those with an image, those of the mix, and those that are left out.
        seconds: by part of the check.
        unchecked: what was not looked at, and the flag that does.
    """

    findings: Findings
    flags: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    lengths: lengths.Summary | None = None
    images: images.Summary | None = None
    models: Models | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    written: str | None = None

    @property
    def verdict(self) -> str:
        if self.findings.stops:
            return CANNOT
        return SKIPPED if self.findings.skips else READY

    @property
    def skipped(self) -> int:
        """Samples that training would leave out."""
        return self.findings.refused

    @property
    def command(self) -> str | None:
        """The training command that leaves bad samples out; None where there is nothing to be left out."""
        if self.written is None and not self.findings.skips:
            return None
        way = ["--bad_samples", "skip"] if self.written is None else ["--skip_samples", self.written]
        return shlex.join(["llava-compodistill", "train", *self.flags, *way])

    def as_json(self) -> dict[str, Any]:
        pair = None
        if self.models is not None:
            names = ("what", "student", "teacher", "follows")
            rows = [dict(zip(names, row, strict=True)) for row in self.models.rows]
            pair = {"rows": rows, "aligned": self.models.aligned_layers()}
        return {
            "verdict": self.verdict,
            "exit_code": EXIT[self.verdict],
            "skipped": self.skipped,
            "samples": self.counts,
            "findings": self.findings.as_json(),
            "lengths": None if self.lengths is None else self.lengths.as_json(),
            "images": None if self.images is None else self.images.as_json(),
            "pair": pair,
            "versions": versions(),
            "unchecked": self.unchecked,
            "command": self.command,
            "skip_list": self.written,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }


class Check:
    """One run of the check.

    Args:
        arguments: a training command line.
        console: for progress; results are in the report.
    """

    def __init__(self, arguments: list[str], options: Options, console: Console):
        self.options, self.console = options, console
        self.findings = Findings()
        self.flags = without_launcher(arguments)
        self.report = Report(self.findings, self.flags)

    def run(self) -> Report:
        parsed = self._timed("flags", lambda: self._parse())
        if parsed is None:
            return self.report
        mix, files = self._timed("records", lambda: self._read(parsed))
        if parsed.has_model:
            models = self._timed("models", lambda: look_at_models(parsed, self.findings, self.options.without_weights))
            self.report.models = models
            check_packages(parsed, self.findings)
            if parsed.model.unfreeze_mm_vision_tower:
                self.report.unchecked.append("the disk space of the encoder that is trained")
            if mix is not None:
                self._timed("lengths", lambda: self._measure(parsed, models, mix, files))
        else:
            self.report.unchecked.append("models, lengths and labels: give --model_name_or_path and the other flags")
        if mix is not None and self.options.images:
            self._timed("images", lambda: self._decode(parsed, files))
        elif mix is not None and any(mix.with_image):
            self.report.unchecked.append("what is in the image files: --images decodes them")
        if self.report.counts:  # lengths and images have refused more
            self.report.counts["usable"] = self.report.counts["read"] - self.report.skipped
        if self.options.write_skip:
            self._write_skip_list()
        return self.report

    def _timed(self, name: str, part: Any) -> Any:
        start = time.perf_counter()
        try:
            return part()
        finally:
            self.report.seconds[name] = time.perf_counter() - start

    def _parse(self) -> Parsed | None:
        register(train=True)
        parsed = parse(self.flags, self.findings)
        if parsed is not None and not parsed.data.data_path:
            self.findings.add(STOPS, "no data: --data_path is missing", remedy="give the files of the stage")
            return None
        return parsed

    def _read(self, parsed: Parsed) -> tuple[Mix | None, list[InspectedRecords]]:
        data, args = parsed.data, parsed.training
        try:
            sources = read_sources(data.data_path)
            left_out = samples_left_out(data, sources)
        except DataError as error:
            self.findings.add(STOPS, f"a data file that cannot be used: {error}")
            return None, []
        for file, samples in left_out.items():  # a new list replaces the one that is in use
            for index, checksum in samples.items():
                self.findings.leave_out(file, index, checksum, None, "on the list before", refused=False)
        total = sum(_size(source) for source in sources)
        with progress_bar(self.console) as bar:
            task = bar.add_task("reading (bytes)", total=total)
            mix, files = read_manifest(
                sources,
                data.image_folder or "",
                data.check_images,
                args.paired,
                data.allow_outside_images,
                args.seed_of_data,
                left_out,
                self.findings,
                keep_paths=self.options.images,
                done=lambda read: bar.advance(task, read),
            )
        if not data.check_images:
            self.report.unchecked.append("whether the image files exist: --check_images False")
        self.report.counts = {
            "files": len(sources),
            "read": sum(len(records) for records in files) + self.report.skipped,
            "usable": sum(len(records) for records in files),
            "with_image": sum(sum(records.with_image) for records in files),
            "in_an_epoch": 0 if mix is None else len(mix),
            "left_out_by_list": sum(len(unwanted) for unwanted in left_out.values()),
        }
        return mix, files

    def _measure(self, parsed: Parsed, models: Models, mix: Mix, files: list[InspectedRecords]) -> None:
        if models.tokenizer is None or models.student is None:
            self.report.unchecked.append("lengths and labels: the student's tokenizer or config cannot be read")
            return
        limit = parsed.training.model_max_length
        limits = lengths.Limits(count_visual_tokens(models.student), limit)
        if models.teacher is not None:
            theirs = count_visual_tokens(models.teacher)
            more = theirs - limits.visual_tokens
            limits = lengths.Limits(limits.visual_tokens, limit, theirs, limit + more)
        data = parsed.data
        data.is_multimodal = True
        data.mm_use_im_start_end = bool(getattr(models.student.config, "mm_use_im_start_end", False))
        kind = PreferenceDataset if parsed.training.paired else CheckedDataset
        dataset = kind(data.data_path, models.tokenizer, data, teacher=models.teacher_text, samples=mix)
        reader = lengths.Reader(dataset, limits, models.template)
        seen: dict[tuple[int, int], int] = {}
        for place in range(len(mix)):
            seen.setdefault(mix.origin(place), place)
        places = list(seen.values())
        places = [places[number] for number in lengths.chosen_places(len(places), self.options.measured)]
        if len(places) < len(seen):
            self.report.unchecked.append(
                f"lengths and labels of all samples but {len(places)}, evenly spread: --lengths all"
            )
        found, visual = np.zeros(len(places), dtype=np.int64), np.zeros(len(places), dtype=np.int64)
        good = cut = lost = 0
        with progress_bar(self.console) as bar:
            task = bar.add_task("tokenizing", total=len(places))
            for reading in lengths.measure(reader, places, self.options.workers, lambda n: bar.advance(task, n)):
                number, place = mix.origin(reading.place)
                records = files[number]
                if reading.problem is not None:
                    level = STOPS if reading.fatal else SKIPS
                    self.findings.add(level, reading.problem, records.example(place))
                    records.leave_out(place, reading.problem)
                    continue
                found[good] = reading.length
                visual[good] = limits.visual_tokens * mix.with_image[reading.place]
                good += 1
                packed = lengths.packed_length(reading, limits, parsed.training.paired)
                self._note_long(parsed.training.pack_length, packed, records.example(place))
                if reading.length <= limit:
                    if not reading.left:
                        self._add_lost(records, place, reading.length, limit)
                        lost += 1
                    continue
                cut += 1
                if reading.left:
                    self.findings.add(
                        NOTE, f"cut at --model_max_length: {reading.length} tokens, the limit is {limit}",
                        records.example(place), "the end of the sample is not learned; see the lengths",
                    )  # fmt: skip
                else:
                    self._add_lost(records, place, reading.length, limit)
                    lost += 1
        self.report.lengths = lengths.Summary(limit, found[:good], visual[:good], cut, lost)

    def _note_long(self, room: int, length: int, example: Any) -> None:
        if 0 < room < length:
            self.findings.add(
                NOTE, f"longer than --pack_length {room}: {length} tokens", example,
                "it has a pack of its own, and a step its memory; --pack_length of at least the longest avoids it",
            )  # fmt: skip

    def _add_lost(self, records: InspectedRecords, place: int, length: int, limit: int) -> None:
        kind = "no answer left within --model_max_length"
        self.findings.add(
            NOTE, f"{kind}: {length} tokens, the limit is {limit}", records.example(place),
            "nothing is learned from it: a larger --model_max_length, or --write_skip leaves it out",
        )  # fmt: skip
        records.leave_out(place, kind, refused=False)

    def _decode(self, parsed: Parsed, files: list[InspectedRecords]) -> None:
        users: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, records in enumerate(files):
            for place, path in enumerate(records.images):
                if path:
                    users[path].append((number, place))
        summary = self.report.images = images.Summary()
        use = images.use_of(parsed.data.image_aspect_ratio, parsed.model.vision_tower)
        with progress_bar(self.console) as bar:
            task = bar.add_task("decoding images", total=len(users))
            for picture in images.inspect_all(list(users), use, self.options.workers, lambda n: bar.advance(task, n)):
                summary.add(picture)
                samples = users[picture.path]
                number, place = samples[0]
                for note in picture.notes:
                    self.findings.add(NOTE, note, files[number].example(place), "training reads it as RGB; look at it")
                if picture.problem is not None:
                    example = files[number].example(place)
                    problem = f"{picture.problem} ({picture.path})"
                    self.findings.add(SKIPS, problem, example, count=len(samples))
                    for number, place in samples:
                        files[number].leave_out(place, picture.problem)

    def _write_skip_list(self) -> None:
        path = self.options.write_skip
        entries = {
            file: [samples[index] for index in sorted(samples)] for file, samples in self.findings.unwanted.items()
        }
        write_skip_list(path, entries)
        self.report.written = path


def versions() -> dict[str, str | None]:
    """Of what reads data and models; None for what is not installed."""
    found: dict[str, str | None] = {"llava_compodistill": __version__}
    for name in (
        "torch",
        "transformers",
        "tokenizers",
        "peft",
        "accelerate",
        "deepspeed",
        "flash-attn",
        "bitsandbytes",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _size(source: Source) -> int:
    return os.path.getsize(source.path) if os.path.isfile(source.path) else 0

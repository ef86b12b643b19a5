"""The samples of a LLaVA data file, left on the disk: 665k of them as Python objects take gigabytes in every process.

Reading keeps the place and the length of each usable sample. A sample is read when it is asked for, by way of the
system's page cache, which all ranks and their workers share.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import time
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..hosts.files import half_a_character
from .image_files import ImageFiles

logger = logging.getLogger(__name__)

_SHOWN = 5
_CHUNK = 1 << 22  # characters
_ANYTHING = ""
_SPACE = re.compile(r"[ \t\n\r]*")


class Records(Sequence):
    """Usable samples of a JSON list of {"id", "image" (optional), "conversations": [{"from", "value"}, ...]}, or of
    JSON Lines (.jsonl), one sample a line.

    Args:
        path: the JSON file. It must stay as it is while the object is in use.
        image_folder: where the samples' image names begin.
        bad_samples: "error", or "skip" to leave bad samples out with a warning.
        check_images: whether to look if each image file exists.
        paired: whether each sample needs a second answer, `rejected`, that is worse than its last.
        allow_outside: whether an image may lie outside the folder. (Links in the folder may lead anywhere.)
        left_out: by index, the CRC-32 of the text of each sample that is not wanted (`skip_list`).

    Attributes:
        words: number of words in the conversation of each sample.
        with_image: 1 for each sample with an image, else 0.
        checksums: CRC-32 of the text of each sample.

    Raises:
        DataError: for an unreadable file, for bad samples under "error", or when no sample is left.
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None,
        bad_samples: str,
        check_images: bool = True,
        paired: bool = False,
        allow_outside: bool = False,
        left_out: Mapping[int, int] | None = None,
    ):
        self._path = path
        self._image_folder, self._paired, self._allow_outside = image_folder, paired, allow_outside
        self._files = ImageFiles() if check_images else None
        self._places, self._sizes, self.checksums = array("q"), array("q"), array("L")
        self.words, self.with_image = array("q"), array("b")
        self._open()
        logger.info("Reading the samples of %s (%.1f MiB).", path, os.fstat(self._descriptor).st_size / 2**20)
        start = time.perf_counter()
        problems: list[tuple[int, Any, str]] = []
        left_out, missed = left_out or {}, 0
        count = 0
        for record, place, text in scan(path):
            checksum = zlib.crc32(text)
            if count in left_out:
                if left_out[count] != checksum:
                    raise DataError(
                        f"--skip_samples: sample {count} of {path} is not the one that the list was written for. Run "
                        "llava-compodistill check --write_skip again."
                    )
                missed += 1
            elif (problem := self._problem(record, count, place, checksum)) is None:
                self._places.append(place)
                self._sizes.append(len(text))
                self.checksums.append(checksum)
                self.words.append(sum(len(turn["value"].split()) for turn in record["conversations"]))
                self.with_image.append(record.get("image") is not None)
            else:
                problems.append((count, record.get("id", count) if isinstance(record, dict) else count, problem))
            count += 1
        if missed != len(left_out):
            raise DataError(
                f"--skip_samples: the list was written for more than the {count} samples of {path}. Run "
                "llava-compodistill check --write_skip again."
            )
        if missed:
            logger.info("%s: %d of %d samples are left out (--skip_samples).", path, missed, count)
        self._files = None  # a listing of folders, which workers need no copy of
        if problems:
            self._report(problems, count, bad_samples)
        if not self._places:
            raise DataError(f"{path}: no usable sample is left.")
        seconds = time.perf_counter() - start
        logger.info("%d samples, %d with an image, checked in %.1f s.", len(self), sum(self.with_image), seconds)

    def _problem(self, record: Any, index: int, place: int, checksum: int) -> str | None:
        """What keeps a sample from being used; `place` is where its text begins in the file."""
        problem = find_problem(record, self._image_folder, self._files, self._allow_outside)
        return find_pair_problem(record) if problem is None and self._paired else problem

    def _report(self, problems: list[tuple[int, Any, str]], count: int, bad_samples: str) -> None:
        summary = describe_problems(problems, count, self._path)
        if bad_samples == "error":
            raise DataError(f"{summary}\n--bad_samples skip leaves them out.")
        logger.warning("%s\nThey are left out.", summary)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample, read anew each time.

        Raises:
            DataError: when the file has been changed since the samples were checked.
        """
        text = os.pread(self._descriptor, self._sizes[index], self._places[index])
        if zlib.crc32(text) != self.checksums[index]:
            raise DataError(
                f"--data_path {self._path} has been changed while it was in use: start the training again, and put a "
                "new file in its place instead of writing into it."
            )
        record = json.loads(text)
        if record.get("image") is None:  # LLaVA asks whether there is an "image", not what it is
            record.pop("image", None)
        return record

    def _open(self) -> None:
        try:
            wait_for_no_pipe = getattr(os, "O_NONBLOCK", 0)
            self._descriptor = os.open(self._path, os.O_RDONLY | wait_for_no_pipe)
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                os.close(self._descriptor)
                raise DataError(f"--data_path {self._path}: is no file. Name the JSON file, or several with commas.")
        except FileNotFoundError:
            raise DataError(f"--data_path {self._path}: there is no such file.") from None
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"--data_path {self._path}: cannot be opened ({error}).") from None
        weakref.finalize(self, os.close, self._descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker that is not forked."""
        self.__dict__.update(state)
        self._open()


def scan(path: str) -> Iterator[tuple[Any, int, bytes]]:
    """Read a JSON list, or JSON Lines, entry by entry.

    Yields:
        (entry, its place in bytes, its text).

    Raises:
        DataError: naming the file and, for malformed JSON, the line.
    """
    try:
        yield from _lines(path) if path.endswith(".jsonl") else _blaming_lines(path)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"--data_path {path}: not UTF-8 text ({error.reason}).") from None
    except RecursionError:
        raise DataError(f"--data_path {path}: a sample is nested too deeply.") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"--data_path {path}: {error}.") from None


def _lines(path: str) -> Iterator[tuple[Any, int, bytes]]:
    """`scan` of JSON Lines; empty lines are passed over."""
    place, empty = 0, True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if text:
                empty = False
                try:
                    entry = json.loads(text.decode())
                except json.JSONDecodeError as error:
                    raise DataError(f"--data_path {path}, line {number}: not valid JSON ({error.msg}).") from None
                yield entry, place + line.index(text), text
            place += len(line)
    if empty:
        raise DataError(f"--data_path {path}: must hold at least one sample.")


def _blaming_lines(path: str) -> Iterator[tuple[Any, int, bytes]]:
    empty = True
    try:
        for entry in _entries(path):
            empty = False
            yield entry
        if not empty:
            return
    except json.JSONDecodeError:
        with open(path, encoding="utf-8") as file:  # read as a whole, it tells the line
            try:
                json.load(file)
            except json.JSONDecodeError as error:
                message = f"--data_path {path}, line {error.lineno}: not valid JSON ({error.msg})."
                raise DataError(message) from None
    raise DataError(f"--data_path {path}: must hold a non-empty JSON list of samples.")


def _entries(path: str) -> Iterator[tuple[Any, int, bytes]]:
    """`scan` without its messages: a JSONDecodeError stands for anything that is not a list of entries."""
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8", newline="") as file:
        text, start, place = "", 0, 0  # what has been read, where in it we are, and where that is in the file

        def read_more() -> bool:
            nonlocal text, start
            more = file.read(max(_CHUNK, len(text)))
            if more:
                text, start = text[start:] + more, 0
            return bool(more)

        def skip_to(wanted: str) -> str:
            """Pass over spaces to one of the characters, and over it; but not over `_ANYTHING`."""
            nonlocal start, place
            while True:
                end = _SPACE.match(text, start).end()
                place += end - start
                start = end
                if start < len(text):
                    break
                if not read_more():
                    raise json.JSONDecodeError("the list ends early", "", 0)
            found = text[start]
            if found in wanted:
                start, place = start + 1, place + 1
            elif wanted != _ANYTHING:
                raise json.JSONDecodeError(f"one of {wanted} expected", "", 0)
            return found

        skip_to("[")
        if skip_to(_ANYTHING) == "]":
            return
        while True:
            skip_to(_ANYTHING)
            while True:
                try:
                    entry, end = decoder.raw_decode(text, start)
                except json.JSONDecodeError:
                    if not read_more():
                        raise
                    continue
                if end < len(text) or not read_more():  # a number may go on
                    break
            own = text[start:end].encode()
            yield entry, place, own
            start, place = end, place + len(own)
            if skip_to(",]") == "]":
                break
        if text[start:].strip(" \t\n\r") or file.read().strip(" \t\n\r"):
            raise json.JSONDecodeError("something follows the list", "", 0)


def describe_problems(problems: list[tuple[int, Any, str]], count: int, source: str) -> str:
    """How many of a file's samples are bad, by kind, and the first few by name.

    Args:
        problems: (index, id, what is wrong) of each bad sample.
        count: of all samples.
    """
    kinds = Counter(text.split(":")[0] for _, _, text in problems)
    lines = [f"{source}: {len(problems)} of {count} samples cannot be used."]
    lines += [f"  {number} x {kind}" for kind, number in kinds.most_common()]
    lines += [f"  sample {index} (id {name!r}): {text}" for index, name, text in problems[:_SHOWN]]
    return "\n".join(lines)


def find_problem(
    record: Any, image_folder: str | None, files: ImageFiles | None = None, allow_outside: bool = False
) -> str | None:
    """What keeps a sample from being used, "kind" or "kind: details"; None when nothing does.

    Args:
        files: tells which image files exist; None not to look.
    """
    if not isinstance(record, dict):
        return f"not an object: {str(record)[:40]!r}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "no conversations"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            return "a turn without 'from' or 'value'"
        if turn["from"] not in ("human", "gpt"):
            return f"unknown speaker: {turn['from']!r} (must be human or gpt)"
        if half_a_character(turn["value"]):
            return "a turn with half a character: a lone surrogate, which no tokenizer takes"
    speakers = [turn["from"] for turn in turns[turns[0]["from"] == "gpt" :]]  # LLaVA drops a gpt turn that begins
    if "gpt" not in speakers:
        return "no answer from gpt"
    if any(speaker != ("human", "gpt")[number % 2] for number, speaker in enumerate(speakers)):
        return f"turns that do not alternate: {', '.join(turn['from'] for turn in turns[:6])}"
    if not any(turn["value"].split() for turn in turns):
        return "nothing but empty turns"
    if any("<image>" in turn["value"] for turn in turns if turn["from"] == "gpt"):
        return "<image> in an answer, where it would be learned as text"
    markers = sum(turn["value"].count("<image>") for turn in turns)
    image = record.get("image")
    if image is None:
        return "<image> in the text but no image" if markers else None
    if not markers:
        return "an image but no <image> in the text"
    if not isinstance(image, str):
        return f"image must be one file name: {str(image)[:60]!r}"
    if markers > 1:
        return f"{markers} <image> markers for one image"
    path = os.path.join(image_folder or "", image)
    if image_folder and not allow_outside and leaves(image, image_folder):
        return (
            "an image outside --image_folder (--allow_outside_images True takes it, and so does an empty "
            f"--image_folder): {image}"
        )
    if files is not None and not files.exists(path):
        return f"missing image: {path}"
    return None


def leaves(image: str, folder: str) -> bool:
    """Whether an image's name leads out of the folder that it should begin in. (Links are not looked at.)"""
    if not os.path.isabs(image) and ".." not in image:
        return False
    root = os.path.join(os.path.abspath(folder), "")
    return not os.path.abspath(os.path.join(folder, image)).startswith(root)


def find_pair_problem(record: dict[str, Any]) -> str | None:
    """What keeps a usable sample from being one of a pair; None when nothing does."""
    rejected, last = record.get("rejected"), record["conversations"][-1]
    if not isinstance(rejected, str) or not rejected.strip():
        return "no rejected answer (a text under `rejected`)"
    if last["from"] != "gpt":
        return "the last turn is not gpt's: there is nothing to reject"
    if rejected.strip() == last["value"].strip():
        return "the rejected answer is the chosen one"
    turns = [*record["conversations"][:-1], {**last, "value": rejected}]
    problem = find_problem({**record, "conversations": turns}, None)
    return None if problem is None else f"the rejected answer: {problem}"

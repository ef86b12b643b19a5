"""Records of an evaluation: JSON lines that a killed run leaves whole, and that the next run goes on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import CompoDistillError, DataError, RecordError, RecordsError
from ..hosts.files import half_a_character, parse_json, read_object, read_text

#: A run's parts whose names alone say too little.
_WORDS = {"weights": "weights that give", "fingerprint": "questions that give", "asked_by": "asked by"}
#: Bytes read at both ends of a tensor.
_PIECE = 16 * 1024


class RecordFile:
    """One JSON object a line, each with an `id`, in the order they were made.

    Args:
        path: the file; what it holds already is kept and offered in `done`.
        run: what the records are made of and with (benchmark, protocol, model, `fingerprint` of the items, …), kept
            beside them in PATH.run.json. Records of another run are an error, so that no summary mixes two.
        ids: the items' ids, in order.
        overwrite: begin anew.

    Attributes:
        done: id -> record of what is there.

    Raises:
        RecordsError: for records of another run, of unknown or repeated items, that are no JSON, or that another
            process is writing.
    """

    def __init__(self, path: Path, run: dict[str, Any], ids: Sequence[str], overwrite: bool = False):
        self.path, self.done = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RecordsError(f"{path} cannot be written: {error.strerror}.") from None
        try:
            self._lock()  # before anything is read or taken away
            if overwrite:
                self._file.truncate(0)
            if path.stat().st_size:
                check_run(path, run, "Take another --output, or --overwrite.")
                self._read(set(ids))
            else:
                write_run(path, run)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        """One writer at a time: an earlier process that a kill has missed would write the same records again."""
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecordsError(f"{self.path}: another process is writing to it. Wait for it, or stop it.") from None

    def _read(self, known: set[str]) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # a kill came in the middle of a line
            self._file.truncate(whole)
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                record = _record(line, f"{self.path}, line {number}")
            except RecordsError as error:
                raise RecordsError(f"{error} --overwrite begins anew.") from None
            key = record["id"]
            if key not in known:
                raise RecordsError(
                    f"{self.path}, line {number}: there is no item {key!r} in the questions: these answer others."
                )
            if key in self.done:
                raise RecordsError(f"{self.path}, line {number}: the item {key!r} is there already.")
            self.done[key] = record

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records through to the disk."""
        for record in records:
            self._file.write(_line(record))
            self.done[record["id"]] = record
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def made_with(model: str, template: str, **more: Any) -> dict[str, Any]:
    """What answers depend on beside the questions: the checkpoint (folder and weights), its template, and `more`."""
    where = os.path.realpath(model) if os.path.isdir(model) else model
    return {"model": where, "weights": weights_of(model), "template": template, **more}


def check_run(path: Path, run: dict[str, Any], way_out: str, unsaid: dict[str, Any] | None = None) -> None:
    """Whether the records of a file were made by such a run, as PATH.run.json beside it says.

    Args:
        way_out: what to do where they were not.
        unsaid: what holds of runs that were written down before that was said of a run.

    Raises:
        RecordsError: when they were not, or nothing says it.
    """
    beside = path.with_name(path.name + ".run.json")
    try:
        before = {**(unsaid or {}), **read_object(beside)}
    except DataError:
        raise RecordsError(
            f"{path}: {beside.name}, which says what made these records, is missing or broken. {way_out}"
        ) from None
    # A checkpoint is known by its weights; it may have been moved.
    known = {"model"} if run.get("weights") else set()
    changed = [name for name in run if before.get(name) != run[name] and name not in known]
    if changed:
        changes = "; ".join(apart(name, before.get(name), run[name]) for name in changed)
        raise RecordsError(f"{path} holds records of another run: {changes}. {way_out}")


def apart(name: str, before: Any, now: Any) -> str:
    """`name BEFORE, not NOW`; of two objects only what differs in them."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(apart(f"{name}.{key}", before.get(key), now.get(key)) for key in names)
    return f"{_WORDS.get(name, name)} {before!r}, not {now!r}"


def write_run(path: Path, run: dict[str, Any]) -> None:
    """Say in PATH.run.json what makes the records of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".run.json")
    part = beside.with_name(beside.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(run, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the records without it, and nobody can go on with them
    part.replace(beside)


def weights_of(model: str) -> str:
    """What tells a checkpoint from another one, wherever it lies: 16 hex digits over its config, and beginning and end
    of each of its tensors (reading all of a large model takes long); empty for a name on the hub."""
    folder = Path(model)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    files += [path for path in (folder / "config.json", folder / "adapter_config.json") if path.is_file()]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            for begin, end in _pieces(path):
                for place in (begin, max(begin, end - _PIECE)):
                    file.seek(place)
                    digest.update(file.read(min(_PIECE, end - place)))
    return digest.hexdigest()[:16] if files else ""


def _pieces(path: Path) -> list[tuple[int, int]]:
    """The tensors of a safetensors file as (begin, end); of another file a thousand stretches of equal length.

    The header is read here because `safetensors.safe_open` hands out slices by a tensor's shape, not stretches of
    bytes, and bfloat16 only through torch, whose import would take seconds in every step of scripts/eval.
    """
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                tensors = json.loads(file.read(length)) if length < size else {}
            starts = sorted(tuple(entry["data_offsets"]) for name, entry in tensors.items() if name != "__metadata__")
            return [(8 + length + begin, 8 + length + end) for begin, end in starts]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # a broken file: whoever loads it will say so
    step = max(_PIECE, -(-size // 1000))
    return [(begin, min(begin + step, size)) for begin in range(0, size, step)]


def write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(map(_line, entries)), encoding="utf-8")
    part.replace(path)


def _line(record: dict[str, Any]) -> str:
    """A record as a line; readable, unless it holds half a character, which UTF-8 cannot."""
    text = json.dumps(record, ensure_ascii=False)
    return (json.dumps(record) if half_a_character(text) else text) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a finished run.

    Raises:
        RecordsError: for a line that is no record, with its number.
    """
    # Not splitlines(): a text may hold other line separators than JSON lines' own.
    lines = read_text(path, RecordsError).split("\n")
    lines = lines if lines[-1] else lines[:-1]
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _record(line: str | bytes, place: str) -> dict[str, Any]:
    record = parse_json(line, place, RecordsError)
    if not isinstance(record, dict) or not isinstance(record.get("id"), str | int):
        raise RecordsError(f"{place}: no record, which is an object with an `id`.")
    return record


@contextlib.contextmanager
def scoring(path: Path, title: str) -> Iterator[None]:
    """Inside, a record of PATH that a scorer cannot read is an error that names the file.

    Args:
        title: of the benchmark.

    Raises:
        RecordsError: naming the file, and the record where the scorer does.
    """
    try:
        yield
    except RecordError as error:
        raise RecordsError(f"{path}: {error}.") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, CompoDistillError):
            raise
        raise RecordsError(
            f"{path}: a record is not one of {title} ({type(error).__name__}: {error}). `eval "
            "--overwrite` makes them anew."
        ) from error


def fingerprint(items: Iterable[Any]) -> str:
    """Of what is asked: 16 hex digits over items that JSON can hold."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]

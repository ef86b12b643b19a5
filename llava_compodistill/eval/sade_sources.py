"""`llava-compodistill sade`: SADE's sources as the one file that `eval` reads.

SADE (arXiv 2308.10509) gathers references from six data sets, each in a form of its own, and its authors publish them
on a drive whose files' fields are not documented. So the fields are named on the command line:

    llava-compodistill sade aro.json --category relation --source ARO-VG --image image_path \\
        --positive true_caption --negatives false_caption
    llava-compodistill sade vlc.json --category attribute --source VL-CheckList --image 0 \\
        --positive 1.POS.0 --negatives 1.NEG.0
    llava-compodistill sade examples.jsonl --category comprehensive --source Winoground --image image_0 image_1 \\
        --captions caption_0 caption_1
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..hosts.files import parse_json, read_json, read_text
from .benchmarks.sade import CATEGORIES
from .records import write_lines


def read_entries(path: Path) -> list[tuple[str, Any]]:
    """(place, entry) of a .json (a list, or an object of entries), .jsonl or .csv file.

    Raises:
        DataError: for a file that is none of these.
    """
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return [(f"{path}, row {number}", row) for number, row in enumerate(csv.DictReader(file), start=1)]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from None
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    if path.suffix == ".jsonl":
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(read_text(path).split("\n"), start=1))
        return [(place, parse_json(line, place)) for place, line in lines if line.strip()]
    entries = read_json(path)
    if isinstance(entries, dict):
        return [(f"{path}, item {key}", entry) for key, entry in entries.items()]
    if not isinstance(entries, list):
        raise DataError(f"{path}: must hold a list or an object of entries, is a {type(entries).__name__}.")
    return [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries)]


def field(entry: Any, name: str, place: str) -> Any:
    """What lies at `a.b.0`: names of objects and numbers in lists, one after the other.

    Raises:
        DataError: when it leads nowhere; names what there is.
    """
    for part in name.split("."):
        if isinstance(entry, dict) and part in entry:
            entry = entry[part]
        elif isinstance(entry, list) and part.isdigit() and int(part) < len(entry):
            entry = entry[int(part)]
        else:
            has = ", ".join(entry) if isinstance(entry, dict) else f"a {type(entry).__name__}"
            if isinstance(entry, list):
                has = f"0 to {len(entry) - 1}"
            raise DataError(f"{place}: {name} leads nowhere at {part!r}; there is {has}.")
    return entry


def texts(entry: Any, names: Sequence[str], place: str) -> list[str]:
    """The texts of some fields, each a text or a list of texts.

    Raises:
        DataError: for anything else, or an empty text.
    """
    found: list[str] = []
    for name in names:
        value = field(entry, name, place)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{place}: {name} must be a text or a list of texts, is {value!r}.")
            found.append(text)
    return found


def convert(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The file's entries as lines of sade.jsonl."""
    two = args.category == "comprehensive"
    made: list[dict[str, Any]] = []
    for number, (place, entry) in enumerate(read_entries(args.file)):
        images = [args.image_prefix + name for name in texts(entry, args.image, place)]
        line: dict[str, Any] = {"id": f"{args.category}-{args.source}-{number}"}
        line |= {"category": args.category, "source": args.source}
        if two:
            line |= {"images": images, "captions": texts(entry, args.captions, place)}
            if len(images) != 2 or len(line["captions"]) != 2:
                raise DataError(f"{place}: a comprehensive item has two images and two captions.")
        else:
            if len(images) != 1:
                raise DataError(f"{place}: --image names {len(images)} images, an item of {args.category} has one.")
            (positive, *others) = texts(entry, [args.positive], place)
            if others:
                raise DataError(f"{place}: {args.positive} holds {1 + len(others)} texts; one is true ({positive!r}).")
            line |= {"image": images[0], "positive": positive, "negatives": texts(entry, args.negatives, place)}
        made.append(line)
    if not made:
        raise DataError(f"{args.file}: holds no entries.")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llava-compodistill sade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="one of SADE's sources: .json, .jsonl or .csv")
    parser.add_argument("--category", choices=CATEGORIES, required=True)
    parser.add_argument("--source", required=True, help="its name; what an earlier call took from it is replaced")
    parser.add_argument("--image", nargs="+", required=True, metavar="FIELD", help="two for comprehensive")
    parser.add_argument("--image-prefix", default="", help="put before the image's name: VG_100K/, …")
    parser.add_argument("--positive", metavar="FIELD", help="the true caption")
    parser.add_argument("--negatives", nargs="+", metavar="FIELD", help="the false ones, texts or lists of texts")
    parser.add_argument("--captions", nargs="+", metavar="FIELD", help="comprehensive: both images' captions")
    parser.add_argument("--data-root", type=Path, default=Path("playground/data/eval"), help="default: %(default)s")
    args = parser.parse_args(argv)
    needed = ("captions",) if args.category == "comprehensive" else ("positive", "negatives")
    missing = [f"--{name}" for name in needed if not getattr(args, name)]
    if missing:
        parser.error(f"--category {args.category} needs {' and '.join(missing)}")
    made = convert(args)
    path = args.data_root / "sade" / "sade.jsonl"
    before = [entry for _, entry in read_entries(path)] if path.is_file() else []
    kept = [line for line in before if (line.get("category"), line.get("source")) != (args.category, args.source)]
    write_lines(path, [*kept, *made])
    counts = {name: sum(line["category"] == name for line in [*kept, *made]) for name in CATEGORIES}
    print(f"{path}: {len(made)} items of {args.source}; now " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    return 0

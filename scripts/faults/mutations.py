"""Valid files made invalid, or odd: bytes, JSON and images, each from a random generator, each with a word for it."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import yaml

#: Put into the text of a JSON file in place of a value, since `json.dumps` would not write them.
_RAW = {
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@digits@": "9" * 5_000,
    "@unclosed@": '{"a": [1, 2',
    "@bare@": "Nope",
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), "",
    " ", "0", "yes", "no", "\ud800", "<image>", "<image>\n<image>", "x" * 300, "y " * 20_000, "../../etc/passwd", "/",
    ".", "\x00", "human", "gpt", "A", [], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["a", "b"], *_RAW,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------
def of_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Another file of about the same bytes."""
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 2, 8, 100)))
    noise = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 64))))
    kinds: dict[str, Callable[[], bytes]] = {
        "cut": lambda: data[:at],
        "emptied": lambda: b"",
        "bits": lambda: data[:at] + bytes(255 - byte for byte in data[at:to]) + data[to:],
        "noise": lambda: data[:at] + noise + data[to:],
        "zeros": lambda: data[:at] + bytes(len(data) - at),
        "twice": lambda: data + data,
        "part twice": lambda: data[:to] + data[at:],
        "part gone": lambda: data[:at] + data[to:],
        "byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode("utf-8", "replace").encode("utf-16"),
        "Latin-1": lambda: data[:at] + "é\xff".encode("latin-1") + data[at:],
        "gzip": lambda: gzip.compress(data[:20_000]),
        "other line ends": lambda: data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\xe2\x80\xa8"))),
        "PNG": lambda: b"\x89PNG\r\n\x1a\n" + data[:100],
        "ELF": lambda: b"\x7fELF" + noise * 20,
        "pickle": lambda: b"\x80\x04\x95" + data[:50],
        "a number": lambda: b"9" * rng.choice((1, 5_000)),
        "null": lambda: b"null",
        "list": lambda: b"[]",
        "object": lambda: b"{}",
    }
    name = rng.choice(list(kinds))
    return kinds[name](), name


# ---------------------------------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------------------------------
def of_json(content: Any, rng: random.Random) -> tuple[Any, str]:
    """The content with one place in it changed; `dump` writes it."""
    holder = {"": json.loads(json.dumps(content))}
    parent, key, path = holder, "", ""
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        path += f"/{key}"
    value = parent[key]
    kind = rng.choice(("value", "value", "value", "removed", "added", "wrapped", "renamed", "repeated", "as text"))
    if kind == "removed" and path:
        del parent[key]
    elif kind == "added" and isinstance(value, dict):
        value[rng.choice(("id", "image", "label", "extra", "\ud800", ""))] = rng.choice(VALUES)
    elif kind == "added" and isinstance(value, list):
        value.insert(rng.randrange(len(value) + 1), rng.choice(VALUES))
    elif kind == "wrapped":
        parent[key] = rng.choice(([value], {"value": value}, [value, value]))
    elif kind == "renamed" and isinstance(parent, dict) and path:
        parent[rng.choice((f"{key}s", str(key).upper(), ""))] = parent.pop(key)
    elif kind == "repeated" and isinstance(parent, list):
        parent[key:key] = [value] * rng.choice((1, 2, 50))
    elif kind == "as text":
        parent[key] = json.dumps(value)
    else:
        kind = "value"
        parent[key] = rng.choice(VALUES)
    return holder[""], f"{kind} at {path[:60] or 'the top'}"


def dump(content: Any, indent: int | None = None) -> bytes:
    text = json.dumps(content, indent=indent)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode()


def of_file(data: bytes, name: str, rng: random.Random) -> tuple[bytes, str]:
    """A text file, by its name JSON, JSON lines or YAML: its bytes or its structure, once or twice."""
    said = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        if rng.random() < 0.35:
            data, words = of_bytes(data, rng)
        else:
            data, words = _of_structure(data, name, rng)
        said.append(words)
    return data, ", ".join(said)


def _of_structure(data: bytes, name: str, rng: random.Random) -> tuple[bytes, str]:
    try:
        if name.endswith((".yaml", ".yml")):
            return _of_yaml(data, rng)
        if not name.endswith(".jsonl") and b"}\n{" not in data:
            changed, words = of_json(json.loads(data), rng)
            return dump(changed), words
        lines = data.split(b"\n")
        number = rng.randrange(len(lines))
        changed, words = of_json(json.loads(lines[number]), rng)
        lines[number] = dump(changed)
        return b"\n".join(lines), f"line {number + 1}: {words}"
    except (ValueError, RecursionError, yaml.YAMLError):  # it is no JSON any more, or the last line is empty
        return of_bytes(data, rng)


_YAML = (
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ndatasets: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
    b"datasets: !!python/object/apply:os.system ['touch MARKER']\n",
    b"datasets: &self [*self]\n",
    b"datasets:\n  - path: [1\n",
    b"--- 1\n--- 2\n",
    b"? [a, b]\n: c\n",
)


def _of_yaml(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    if rng.random() < 0.3:
        number = rng.randrange(len(_YAML))
        return _YAML[number], f"YAML {number}"
    changed, words = of_json(yaml.safe_load(data), rng)
    return dump(changed), words  # JSON is YAML


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------
def _png(width: int, height: int, rows: bytes, bits: int = 8, color: int = 0) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    packed = zlib.compress(rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _bomb(width: int, height: int, written: bool) -> bytes:
    return _png(width, height, bytes(height * (1 + width // 8)) if written else b"", bits=1)


_EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
    b"(MARKER) (w) file closefile\nnewpath 0 0 moveto 64 64 lineto stroke\nshowpage\n%%EOF\n"
)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "IM")
MODES = ("RGB", "L", "P", "RGBA", "1", "LA", "CMYK", "I", "F", "I;16", "YCbCr", "HSV")
SIZES = ((56, 56), (1, 1), (1, 300), (300, 1), (2_000, 3), (640, 480))


def image(rng: random.Random) -> tuple[bytes, str]:
    """An image file: sound, odd, hostile, or a sound one with wrong bytes."""
    kind = rng.random()
    if kind < 0.15:
        odd: dict[str, Callable[[], bytes]] = {
            "EPS": lambda: _EPS,
            "bomb by its header": lambda: _bomb(60_000, 60_000, False),
            "bomb": lambda: _bomb(20_000, 20_000, True),
            "long": lambda: _bomb(20_000, 10, True),
            "longer": lambda: _bomb(65_000, 1, True),
            "no pixels": lambda: _png(0, 0, b""),
            "pixels are missing": lambda: _png(100, 100, bytes(50)),
            "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            "a page": lambda: b"<html><body>404</body></html>",
            "emptied": lambda: b"",
        }
        name = rng.choice(list(odd))
        return odd[name](), name
    data, name = _sound(rng)
    if kind < 0.35:
        return data, name
    for _ in range(rng.choice((1, 1, 2, 5))):
        data, words = of_bytes(data, rng)
        name += f", {words}"
    return data, name


def _sound(rng: random.Random) -> tuple[bytes, str]:
    from PIL import Image

    size, mode, form = rng.choice(SIZES), rng.choice(MODES), rng.choice(FORMATS)
    made = Image.frombytes("L", size, rng.randbytes(size[0] * size[1]))
    try:
        made = made.convert(mode)
        target = io.BytesIO()
        more = {"save_all": True, "append_images": [made, made]} if form in ("GIF", "TIFF", "WEBP") else {}
        made.save(target, form, **(more if rng.random() < 0.3 else {}))
    except (OSError, ValueError, KeyError, TypeError):  # a format that does not have this mode
        target, form, mode = io.BytesIO(), "PNG", "L"
        Image.new("L", size, 9).save(target, form)
    return target.getvalue(), f"{form} {mode} {size[0]}x{size[1]}"

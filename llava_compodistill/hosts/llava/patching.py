"""Small unified diffs, applied to a folder: exact context, all files or none, and back again.

Written out here because LLaVA also arrives as an unpacked wheel, on machines without git and inside other git
repositories, where `git apply` skips files in silence. The patches remain ordinary: `git apply` takes them too.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import PatchError

_TEMPORARY = ".compodistill-tmp"
_HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")


@dataclass
class Hunk:
    """Lines before and after, and the 1-based line where the old ones begin."""

    start: int
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def reversed(self) -> Hunk:
        return Hunk(self.start, self.new, self.old)


Patch = dict[str, list[Hunk]]


def read_patch(path: Path) -> Patch:
    """Parse a patch file: path below the root -> hunks. Text before the first `diff --git` is its description."""
    hunks: Patch = {}
    current: list[Hunk] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("+++ b/"):
            current = hunks.setdefault(line[len("+++ b/") :], [])
        elif match := _HUNK.match(line):
            if current is None:
                raise PatchError(f"{path}, line {number}: a hunk before the name of its file.")
            current.append(Hunk(int(match[1])))
        elif line.startswith(("diff --git ", "--- ")):
            current = None
        elif current:
            if not line or line[0] not in " +-":
                raise PatchError(f"{path}, line {number}: expected a line that begins with a space, + or -.")
            if line[0] in " -":
                current[-1].old.append(line[1:])
            if line[0] in " +":
                current[-1].new.append(line[1:])
    if not hunks or not all(hunks.values()):
        raise PatchError(f"{path} holds no change.")
    return hunks


def patched_text(text: str, hunks: list[Hunk], reverse: bool = False) -> str | None:
    """The text after the hunks, or None when a hunk does not fit exactly once. Line ends of the text are kept."""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines()
    for hunk in [hunk.reversed() for hunk in hunks] if reverse else hunks:
        span = len(hunk.old)
        places = [i for i in range(len(lines) - span + 1) if lines[i : i + span] == hunk.old]
        # A hunk that only adds lines also "fits" where it is applied already.
        adds_only = hunk.old == hunk.new[:span]
        if len(places) != 1 or (adds_only and lines[places[0] : places[0] + len(hunk.new)] == hunk.new):
            return None
        lines[places[0] : places[0] + span] = hunk.new
    return newline.join(lines) + (newline if text.endswith(("\n", "\r")) else "")


def plan(root: Path, patch: Patch, reverse: bool = False) -> dict[Path, str] | None:
    """New contents of every file the patch touches, or None when it does not fit as a whole."""
    contents: dict[Path, str] = {}
    for name, hunks in patch.items():
        path = root / name
        if not path.is_file():
            return None
        text = patched_text(path.read_bytes().decode("utf-8", "surrogateescape"), hunks, reverse)
        if text is None:
            return None
        contents[path] = text
    return contents


def write_all(contents: dict[Path, str]) -> None:
    """Replace the files by their new contents; when one cannot be written, all have their old ones.

    All new contents are on the disk before the first takes its place, so that a full disk is met while nothing has
    changed.

    Raises:
        PatchError: naming the file, and those that could not be put back.
    """
    new = {path: path.with_name(path.name + _TEMPORARY) for path in contents}
    before = {path: path.read_bytes() for path in contents}
    path, done = next(iter(contents), None), []
    try:
        for path, text in contents.items():
            _write(new[path], text.encode("utf-8", "surrogateescape"), path.stat().st_mode)
        for path in contents:
            os.replace(new[path], path)
            done.append(path)
    except OSError as error:
        stuck = [str(written) for written in done if not _put_back(written, before[written])]
        kept = "nothing was changed"
        if stuck:
            kept = f"{', '.join(stuck)} could not be put back. When it can be written, run the same command again"
        raise PatchError(f"{path} cannot be written ({error.strerror}); {kept}.") from error
    finally:
        for temporary in new.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _put_back(path: Path, content: bytes) -> bool:
    try:
        replace_whole(path, content, path.stat().st_mode)
    except OSError:
        return False
    return True


def replace_whole(path: Path, content: bytes, mode: int) -> None:
    """Write a file with these rights, so that after a kill, a full disk or a power cut it is the old or the new one.

    A new file takes the place of the old: a hard link (as some installers make) keeps its own content.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        _write(temporary, content, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode)

"""Which image files exist, asked for a million of them: a folder is listed once instead of asking for each file."""

from __future__ import annotations

import os
from collections import Counter

#: Files of a folder that are asked for one by one before it is listed: a folder may hold far more than is wanted.
_SINGLY = 32


class ImageFiles:
    """Remembers the listings of the folders that it was asked about, and the files that are in none of them."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._listings: dict[str, set[str]] = {}
        self._found: dict[str, bool] = {}

    def exists(self, path: str) -> bool:
        """What `os.path.isfile` says."""
        folder, name = os.path.split(path)
        listing = self._listings.get(folder)
        if listing is None:
            self._asked[folder] += 1
            if self._asked[folder] > _SINGLY:
                listing = self._listings[folder] = _files_in(folder)
        if listing is not None and name in listing:
            return True
        # Not listed: another spelling on a file system that takes any, or a file that has just come.
        if path not in self._found:
            self._found[path] = os.path.isfile(path)
        return self._found[path]


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if _is_file(entry)}
    except OSError:
        return set()


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads in a circle
        return False

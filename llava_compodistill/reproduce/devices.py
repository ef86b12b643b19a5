"""The machine's GPUs in sets, one for each training that runs at a time."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import CompoDistillError, DataError


class Stopped(CompoDistillError, RuntimeError):
    """What waited for a device is not begun any more: another run has failed, or the user has stopped the command."""


class Devices:
    """Sets of devices, lent one at a time to whoever asks first in the order of priorities.

    Args:
        sets: what CUDA_VISIBLE_DEVICES is for each set.
    """

    def __init__(self, sets: Sequence[str]):
        self.sets = list(sets)
        self._free = list(range(len(self.sets)))
        self._waiting: list[tuple[Any, int]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    @contextlib.contextmanager
    def borrow(self, priority: Any = 0) -> Iterator[tuple[int, str]]:
        """(number of the set, its devices), given back at the end. Lower priorities come first; blocks until it is
        this one's turn. An error in between ends all lending.

        Raises:
            Stopped: after `close`.
        """
        place = (priority, next(self._numbers))
        with self._changed:
            heapq.heappush(self._waiting, place)
            try:
                self._changed.wait_for(lambda: self._closed or (self._free and self._waiting[0] == place))
                if self._closed:
                    raise Stopped("stopped before it began")
            finally:
                self._waiting.remove(place)
                heapq.heapify(self._waiting)
                self._changed.notify_all()
            number = self._free.pop(0)
        try:
            yield number, self.sets[number]
        except BaseException:
            self.close()  # before anyone else gets the devices
            raise
        finally:
            with self._changed:
                self._free.append(number)
                self._changed.notify_all()

    def close(self) -> None:
        """Lend nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def device_sets(device: str, gpus_per_run: int | None) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each run at a time: of the GPUs that this process may see, in sets of `gpus_per_run`.

    Raises:
        DataError: without a CUDA device, or with fewer than a run takes.
    """
    if device == "cpu":
        return ["-1"]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise DataError("no CUDA device here. `device: cpu` in the world file trains on the CPU: for tiny models.")
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = named[:count] if named else [str(number) for number in range(count)]
    size = gpus_per_run or len(names)
    if size > len(names):
        raise DataError(f"gpus_per_run {size}: there are only {len(names)} GPUs here ({', '.join(names)}).")
    return [",".join(names[start : start + size]) for start in range(0, len(names) - size + 1, size)]

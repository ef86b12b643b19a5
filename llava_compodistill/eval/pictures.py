"""Images opened, decoded and preprocessed by worker processes, a bounded number of them ahead of the model.

The order is the model's, so nothing depends on the number of workers. An image that cannot be read, or that kills its
worker, is an `Unreadable` in the place of its pixels; the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .marks import Picture, open_picture

logger = logging.getLogger(__name__)
#: Where worker processes hand tensors over, and the part of what is free there that may be taken.
_SHARED = Path("/dev/shm")
_PART = 0.5


def workers_by_default(on_gpu: bool, processes: int) -> int:
    """How many processes read images for each of some models: the cores that there are for it, 8 at most; none for a
    model on the CPU, which needs the cores itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes)) if on_gpu else 0


class Unreadable(DataError):
    """An image that cannot be read; names it and says why."""


class Pixels(NamedTuple):
    """What a vision tower takes, [3, H, W] or [crops, 3, H, W], and the picture's (width, height)."""

    values: torch.Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class MakePixels:
    """Picture -> `Pixels`, as LLaVA's `process_images` makes them; an object that worker processes can be sent.

    Attributes:
        process: LLaVA's `process_images`.
        processor: the tower's image processor.
        config: the model's.
        dtype: of the pixels: what is narrowed here is half as much to hand over.
        open_image: a request's `image` -> picture in RGB.
    """

    process: Callable[..., Any]
    processor: Any
    config: Any
    dtype: torch.dtype
    open_image: Callable[[Any], Any] = open_picture

    def __call__(self, picture: Picture) -> Pixels | Unreadable:
        try:
            image = self.open_image(picture)
            return Pixels(self.process([image], self.processor, self.config)[0].to(self.dtype), image.size)
        except DataError as error:
            return Unreadable(str(error))
        except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, …
            return Unreadable(f"{picture}: cannot be read as an image ({error}).")


class Pictures:
    """Pixels of pictures, which are expected in an order.

    Args:
        make: picture -> pixels.
        workers: processes; 0 makes them here, when they are asked for.
        ahead: how many pictures may wait, at most.

    Attributes:
        waited: seconds that `take` has waited for pixels.
    """

    def __init__(self, make: Callable[[Picture], Pixels | Unreadable], workers: int = 0, ahead: int = 32):
        self.make, self.workers, self.ahead, self.waited = make, workers, ahead, 0.0
        self._expected: list[Picture] = []
        self._next = 0
        self._made: _Ahead | None = None
        self._held: dict[Picture, Pixels | Unreadable] = {}

    def expect(self, pictures: Iterable[Picture]) -> None:
        """Begin to make pictures that will be taken in this order; what was expected before is forgotten."""
        self.close()
        self._expected = list(pictures) if self.workers else []

    def take(self, pictures: Sequence[Picture]) -> list[Pixels | Unreadable]:
        """The pixels of a batch; they are held until the next batch, since a batch that is too large comes again."""
        started = time.perf_counter()
        held = {picture: self._held[picture] for picture in pictures if picture in self._held}
        for picture in pictures:
            if picture not in held:
                held[picture] = self._find(picture, held)
        self._held = held
        self.waited += time.perf_counter() - started
        return [held[picture] for picture in pictures]

    def close(self) -> None:
        """End the workers."""
        self._stop()
        self._expected, self._next, self._held = [], 0, {}

    def _find(self, picture: Picture, held: dict[Picture, Pixels | Unreadable]) -> Pixels | Unreadable:
        try:
            place = self._expected.index(picture, self._next)
        except ValueError:
            return self.make(picture)  # nobody said that it would come
        while self._next <= place:
            number = self._next
            held[self._expected[number]] = self._following()
            self._next = number + 1
        return held[picture]

    def _following(self) -> Pixels | Unreadable:
        """The next of the expected pictures. The order of `take` is that of `expect`, up to the end of a batch."""
        if self._made is None:
            room = self._room()
            loader = self._loader(self._expected[self._next :], self.workers, room // 2)
            self._made = _Ahead(loader, room - room // 2 - 1)
        try:
            return self._made.next()
        except RuntimeError as error:  # a worker was killed, by a decoder or for want of memory
            logger.warning("A worker that reads images has died (%s).", str(error).split("\n")[0])
        # One picture at a time shows whether it is this one; the workers begin anew behind it.
        self._stop()
        picture = self._expected[self._next]
        try:
            return next(iter(self._loader([picture], 1, 1)))
        except RuntimeError:
            return Unreadable(f"{picture}: cannot be read as an image (it kills the process that opens it).")

    def _stop(self) -> None:
        if self._made is not None:
            self._made.stop()
        self._made = None

    def _loader(self, pictures: Sequence[Picture], workers: int, ahead: int) -> DataLoader:
        workers = min(workers, len(pictures))
        return DataLoader(
            _Made(pictures, self.make),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=max(1, ahead // workers),
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            worker_init_fn=_quietly,
        )

    def _room(self) -> int:
        """How many pictures may wait: `ahead`, or fewer where shared memory is short (64 MiB in many containers)."""
        first = self.make(self._expected[self._next])
        if not _SHARED.is_dir() or isinstance(first, Unreadable):
            return self.ahead
        size = max(1, first.values.numel() * first.values.element_size())
        fitting = int(_PART * shutil.disk_usage(_SHARED).free / size)
        if fitting < self.workers:
            logger.warning("%s has room for %d images: one worker reads them.", _SHARED, fitting)
            self.workers = 1
        return max(1, min(self.ahead, fitting))


class _Ahead:
    """What a loader gives, taken from its workers by a thread: that takes about a millisecond an image, which would
    otherwise be the model's.

    Args:
        most: how many may wait here, beside the one that the thread has at hand.
    """

    def __init__(self, loader: DataLoader, most: int):
        self._queue: queue.Queue[Any] = queue.Queue(max(1, most))
        self._stopped = threading.Event()
        # The workers are forked here, while no other code runs that they would inherit halfway.
        self._thread = threading.Thread(target=self._pull, args=(iter(loader),), daemon=True)
        self._thread.start()

    def _pull(self, made_by_workers: Iterator[Any]) -> None:
        try:
            for made in made_by_workers:
                self._put(made)
                if self._stopped.is_set():
                    return
        except RuntimeError as error:
            self._put(error)

    def _put(self, made: Any) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(made, timeout=0.1)
                return

    def next(self) -> Pixels | Unreadable:
        """The next, waiting for it; raises RuntimeError when a worker has died."""
        made = self._queue.get()
        if isinstance(made, RuntimeError):
            raise made
        return made

    def stop(self) -> None:
        """End thread and workers."""
        self._stopped.set()
        self._thread.join()


class _Made(Dataset):
    def __init__(self, pictures: Sequence[Picture], make: Callable[[Picture], Pixels | Unreadable]):
        self.pictures, self.make = pictures, make

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Pixels | Unreadable:
        return self.make(self.pictures[index])


def _as_it_is(made: Any) -> Any:
    return made


def _quietly(number: int) -> None:
    """A worker leaves Ctrl-C to the process that answers it."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)

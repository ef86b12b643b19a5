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
import signal
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
from ..hosts.llava.images import prepared_for
from .marks import Picture, open_picture

logger = logging.getLogger(__name__)
#: Where worker processes hand tensors over, and the part of it that may be taken.
_SHARED = Path("/dev/shm")
_PART = 0.5
#: Images that a worker makes before one of them is taken.
_EACH = 2


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
            with prepared_for(getattr(self.config, "image_aspect_ratio", None), self.processor):
                image = self.open_image(picture)
            return self._made(image)
        except DataError as error:
            named = str(error).startswith(f"{picture}:")
            return Unreadable(str(error) if named else f"{picture}: cannot be read as an image ({error})")
        except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, …
            return Unreadable(f"{picture}: cannot be read as an image ({error}).")

    def _made(self, image: Any) -> Pixels:
        return Pixels(self.process([image], self.processor, self.config)[0].to(self.dtype), image.size)

    def size(self) -> int:
        """Bytes of an image's pixels, about: of a large blank one."""
        from PIL import Image

        values = self._made(Image.new("RGB", (1024, 1024))).values
        return values.numel() * values.element_size()


class Pictures:
    """Pixels of pictures, which are expected in an order.

    Args:
        make: picture -> pixels.
        workers: processes; 0 makes them here, when they are asked for.
        ahead: how many pictures may wait, about.
        processes: others like this one on this machine, itself among them: they share the shared memory.

    Attributes:
        waited: seconds that `take` has waited for pixels.
    """

    def __init__(self, make: MakePixels, workers: int = 0, ahead: int = 32, processes: int = 1):
        self.make, self.workers, self.ahead, self.processes, self.waited = make, workers, ahead, processes, 0.0
        self._expected: list[Picture] = []
        self._next = 0
        self._made: _Ahead | None = None
        self._held: dict[Picture, Pixels | Unreadable] = {}

    def expect(self, pictures: Iterable[Picture]) -> None:
        """Begin to make pictures that will be taken in this order; what was expected before is forgotten."""
        self.close()
        self._expected = list(pictures) if self.workers else []

    def begin(self) -> None:
        """Forget what is held where nothing is expected: a picture's name may stand for another one by now."""
        if not self._expected:
            self._held = {}

    def take(self, pictures: Sequence[Picture]) -> list[Pixels | Unreadable]:
        """The pixels of a batch. They are held for a while: a batch that is too large comes again in parts."""
        started = time.perf_counter()
        for picture in pictures:
            if picture not in self._held:
                self._held[picture] = self._find(picture)
        found = [self._held[picture] for picture in pictures]
        for picture in list(self._held)[: -max(self.ahead, len(pictures))]:
            del self._held[picture]
        self.waited += time.perf_counter() - started
        return found

    def close(self) -> None:
        """End the workers."""
        self._stop()
        self._expected, self._next, self._held = [], 0, {}

    def _find(self, picture: Picture) -> Pixels | Unreadable:
        # No further than may wait: a picture that was dropped may be expected once more, far ahead.
        coming = self._expected[self._next : self._next + self.ahead]
        if picture not in coming:
            return self.make(picture)
        for _ in range(coming.index(picture) + 1):
            made = self._following()
            self._held[self._expected[self._next]] = made
            self._next += 1
        return made

    def _following(self) -> Pixels | Unreadable:
        """The next of the expected pictures."""
        picture = self._expected[self._next]
        if self._made is None:
            try:
                self._made = _Ahead(self._loader(self._expected[self._next :], self.workers), self._room())
            except OSError as error:  # too many open files, no more processes
                logger.warning("Images are read without workers from here on (%s).", error)
                self.workers = 0
                return self.make(picture)
        try:
            return self._made.next()
        except Exception as error:  # a RuntimeError, or what a connection that breaks off raises
            logger.warning("A worker that reads images has died (%s).", str(error).split("\n")[0] or repr(error))
        # One picture at a time shows whether it is this one; the workers begin anew behind it.
        self._stop()
        one = _Ahead(self._loader([picture], 1), 1)
        try:
            return one.next()
        except Exception:
            return Unreadable(f"{picture}: cannot be read as an image (it kills the process that opens it).")
        finally:
            one.stop()

    def _stop(self) -> None:
        if self._made is not None:
            self._made.stop()
        self._made = None

    def _loader(self, pictures: Sequence[Picture], workers: int) -> DataLoader:
        workers = self._fitting(min(workers, len(pictures)))
        return DataLoader(
            _Made(pictures, self.make),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=_EACH,
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            worker_init_fn=_quietly,
        )

    def _fitting(self, workers: int) -> int:
        """As many workers as shared memory has room for (64 MiB in many containers): each hands over `_EACH`."""
        if not _SHARED.is_dir():
            return workers
        room = _PART * shutil.disk_usage(_SHARED).total / self.processes
        fitting = max(1, int(room / (_EACH * max(1, self.make.size()))))
        if fitting < workers:
            logger.warning("%s has room for %d workers that read images, not %d.", _SHARED, fitting, workers)
        return min(workers, fitting)

    def _room(self) -> int:
        """How many may wait beside those that the workers hand over and the one at hand."""
        return self.ahead - _EACH * self.workers - 1


class _Ahead:
    """What a loader gives, taken from its workers by a thread: that takes about a millisecond an image, which would
    otherwise be the model's. What waits here is no longer in shared memory.

    Args:
        most: how many may wait here, beside the one that the thread has at hand.
    """

    def __init__(self, loader: DataLoader, most: int):
        self._queue: queue.Queue[Any] = queue.Queue(max(1, most))
        self._stopped = threading.Event()
        made_by_workers = _unwatched(iter(loader))  # starts them
        self._thread = threading.Thread(target=self._pull, args=(made_by_workers,), daemon=True)
        self._thread.start()

    def _pull(self, made_by_workers: Iterator[Any]) -> None:
        try:
            for made in made_by_workers:
                if isinstance(made, Pixels):
                    made = made._replace(values=made.values.clone())
                self._put(made)
                if self._stopped.is_set():
                    return
        except Exception as error:
            self._put(error)

    def _put(self, made: Any) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(made, timeout=0.1)
                return

    def next(self) -> Pixels | Unreadable:
        """The next, waiting for it; raises what the loader raises when a worker has died."""
        made = self._queue.get()
        if isinstance(made, Exception) and not isinstance(made, Unreadable):
            raise made
        return made

    def stop(self) -> None:
        """End thread and workers; an image that takes long to read is not waited for."""
        self._stopped.set()
        self._thread.join(timeout=1)


def _unwatched(workers: Any) -> Any:
    """A started loader whose workers PyTorch's handler of SIGCHLD does not know: it would raise in the main thread,
    wherever that is. The thread that asks the workers finds out by itself that one has died, within seconds."""
    if getattr(workers, "_worker_pids_set", False):
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(workers))
        workers._worker_pids_set = False  # the loader's own end would remove them once more, and fail
    return workers


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)

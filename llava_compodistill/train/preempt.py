"""Signals that end a run: it makes its step, saves a checkpoint, and goes on from there when it is started again.

SIGTERM and SIGUSR1, which schedulers send before they take a machine back, end with exit status 75 (EX_TEMPFAIL: try
again later); SIGINT, Ctrl-C, with 130. The same signal a second time has its usual effect, and so has Ctrl-C after
another. Before the first step nothing is changed: there is nothing to save.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

logger = logging.getLogger(__name__)

#: Exit status by signal. Where ranks are given several, the last of these counts.
EXIT_STATUS = {signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGTERM: 75}
_ORDER = [None, *EXIT_STATUS]
#: Seconds in which a signal that comes again is the same one: torchrun and deepspeed pass on what they get, also where
#: it was sent to their processes as well.
PASSED_ON = 2.0


class Preempted(SystemExit):
    """Ends a run that a signal has stopped, after its checkpoint is saved; `code` is the exit status."""


class StopOnSignal(transformers.TrainerCallback):
    """Asks for a checkpoint at the end of the step in which one of the signals came, on all ranks alike."""

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._times: dict[int, float] = {}
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped_by = self._received = None
        self._times = {}
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # On the CPU, so that no rank waits for its GPU.
            on_cpu = torch.distributed.get_backend() == "gloo"
            self._group = None if on_cpu else self._group or torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread() and not self._before:  # Python allows it there alone
            self._before = {number: signal.signal(number, self._receive) for number in EXIT_STATUS}

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        again = number in self._times
        if again and now - self._times[number] < PASSED_ON:
            return
        if again or (number == signal.SIGINT and self._times):
            self.restore()
            os.kill(os.getpid(), number)
            return
        self._times[number] = now
        self._received = signal.Signals(number)
        # Neither a logger nor print: either may be what the signal has interrupted.
        os.write(2, f"\n{self._received.name}: this step is finished and saved; again ends at once.\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped_by = self._agree()
        if self.stopped_by is not None:
            control.should_save = True

    def _agree(self) -> signal.Signals | None:
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return self._received
        place = torch.tensor(_ORDER.index(self._received))
        torch.distributed.all_reduce(place, torch.distributed.ReduceOp.MAX, group=self._group)
        return _ORDER[int(place)]

    @contextlib.contextmanager
    def saving_all(self, args: Any) -> Iterator[None]:
        """Inside, a run that is stopped saves its optimizer, too, whatever `--save_only_model` says."""
        kept = args.save_only_model if hasattr(args, "save_only_model") else None
        if self.stopped_by is not None and kept:
            args.save_only_model = False
        try:
            yield
        finally:
            if kept is not None:
                args.save_only_model = kept

    def leave(self, trainer: transformers.Trainer) -> None:
        """After a checkpoint is saved: end a run that was stopped. (One that has made its last step ends by itself.)

        Raises:
            Preempted: on all ranks.
        """
        state = trainer.state
        if self.stopped_by is None or state.global_step >= state.max_steps:
            return
        trainer.callback_handler.on_train_end(trainer.args, state, trainer.control)
        status = EXIT_STATUS[self.stopped_by]
        logger.warning(
            "Stopped by %s after step %d of %d (exit status %d): checkpoint-%d in %s is complete. The same command "
            "goes on from there.",
            *(self.stopped_by.name, state.global_step, state.max_steps, status, state.global_step),
            trainer.args.output_dir,
        )
        raise Preempted(status)

    def restore(self) -> None:
        """Give the signals back the effect that they had before training."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


class Shielded:
    """What a worker that loads data does first: it goes on when the signals reach it, too (they are sent to whole
    groups of processes, by Ctrl-C and by schedulers), and the step can be finished. It still ends with its trainer.

    Args:
        first: what it does otherwise (`worker_init_fn`).
    """

    def __init__(self, first: Callable[[int], None] | None):
        self.first = first

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        # PyTorch ends workers by SIGTERM; only from their parent it is meant for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
        if self.first is not None:
            self.first(worker)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

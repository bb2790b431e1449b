"""SIGTERM and Ctrl-C, deferred until the current work is in a state worth keeping.

The first signal is recorded, and the work checks for it where it can stop; the second one stops at
once. Nested contexts share the request: a reference pass within a training run ends between two
groups, and the run then saves.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOTICE = (
    b"\nStopping as soon as the work in hand is safe on the disk; the same signal again stops at "
    b"once.\n"
)


class Stop:
    """A request to stop, once a signal has come.

    Attributes:
        signal: the number of the first signal, or None.
        signals: how many signals have come.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.signals = 0
        self._waits = True

    def raise_if_requested(self) -> None:
        """Raise if a signal has come.

        Raises:
            SystemExit: 143, after SIGTERM.
            KeyboardInterrupt: after Ctrl-C.
        """
        if self.signal is not None:
            _exit(self.signal)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context in which the first signal raises immediately, wherever it comes."""
        with self._waiting(False):
            self.raise_if_requested()
            yield

    @contextmanager
    def _waiting(self, waits: bool) -> Iterator[None]:
        before, self._waits = self._waits, waits
        try:
            yield
        finally:
            self._waits = before

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals > 1 or not self._waits:
            self.signal = self.signal or number
            _exit(number)
        self.signal = number
        os.write(2, _NOTICE)  # print and logging are not safe inside a handler


_active: Stop | None = None


@contextmanager
def graceful_shutdown() -> Iterator[Stop]:
    """Defer SIGTERM and Ctrl-C until the caller checks for them, so that no work is cut in two.

    Signals that are ignored stay ignored. In other threads, which get no signals, nothing changes.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
    elif _active is not None:
        with _active._waiting(True):
            yield _active
    else:
        stop, before = Stop(), {}
        try:
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler is not None and handler is not signal.SIG_IGN:
                    before[number] = signal.signal(number, stop._handle)
            _active = stop
            yield stop
        finally:
            _active = None
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[Stop]:
    """Do what is inside to its end; a signal that came meanwhile is obeyed then.

    Inside another such context, or `graceful_shutdown`, it is obeyed at the end of that one.

    Raises:
        SystemExit, KeyboardInterrupt: at the end, as `Stop.raise_if_requested`.
    """
    outermost = _active is None
    with graceful_shutdown() as stop:
        yield stop
    if outermost:
        stop.raise_if_requested()


def _exit(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)

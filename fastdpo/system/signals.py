"""SIGTERM and Ctrl-C, deferred until the current work is in a state worth keeping.

The first signal is recorded, and the work checks for it where it can stop; the second one stops at
once. Nested contexts share the request: a reference pass within a training run ends between two
groups, and the run then saves.

Several ranks stop together: what has come to one of them counts from the moment at which all have
agreed on it.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from fastdpo.system import ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOTICE = (
    b"\nStopping as soon as the work in hand is safe on the disk; the same signal again stops at "
    b"once.\n"
)
REPEATED_S = 5.0
"""A launcher passes a signal on that its ranks may have had already: soon after it is no second."""


class Stop:
    """A request to stop, once a signal has come.

    Attributes:
        received: the number of the first signal that came to this process, or None.
        signals: how many signals have come to it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.signals = 0
        self._received_s = 0.0
        self._agreed: int | None = None
        self._waits = True

    @property
    def signal(self) -> int | None:
        """The number of the first signal, or None; of several ranks, what they have agreed on."""
        return self.received if ranks.count() == 1 else self._agreed

    def agree(self) -> int | None:
        """`signal`, after the ranks have told each other; all call it at the same point."""
        if self._agreed is None:
            self._agreed = ranks.highest(self.received or 0) or None
        return self.signal

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
        """A context in which the first signal raises immediately, wherever it comes.

        With several ranks it raises where these next `meet`.
        """
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
        alone, now = ranks.count() == 1, time.monotonic()
        if not alone and self.received is not None and now - self._received_s < REPEATED_S:
            return
        self.signals += 1
        self.received, self._received_s = self.received or number, now
        if self.signals > 1 or (alone and not self._waits):
            _exit(number)
        if ranks.is_first():
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
                if signal.getsignal(number) == stop._handle:  # nobody has put another in its place
                    signal.signal(number, handler)


def hurries() -> bool:
    """Tell whether a rank should leave the rest of its part undone and go where they `meet`."""
    return _active is not None and _active.received is not None and not _active._waits


def meet() -> None:
    """Agree on signals where ranks come together, and raise if the work may be cut short here."""
    if _active is not None and ranks.count() > 1:
        _active.agree()
        if not _active._waits:
            _active.raise_if_requested()


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
        stop.agree()
        stop.raise_if_requested()


def _exit(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)

"""Bounds on what files and templates from elsewhere may cost: CPU seconds, and memory.

Neither bound costs anything that could be measured beside the work, so they stay on. Where the
operating system has no such bound (Windows; CPU seconds outside the main thread), there is none.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class TooSlowError(ValueError):
    """Work that took more CPU seconds than it was given."""


@contextmanager
def cpu_seconds(most: float) -> Iterator[None]:
    """Interrupt the work inside once this process has computed for `most` seconds.

    What counts is the time of the processor, so a busy or sleeping machine interrupts nothing.
    Python code and its regular expressions are interrupted; a call into another library ends first.

    Raises:
        TooSlowError: inside, wherever the work is.
    """
    has_timer = hasattr(signal, "setitimer")
    if not has_timer or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise TooSlowError(f"it was stopped after {most:g} seconds of computing")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, most)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def more_memory(most: int) -> Iterator[None]:
    """Let this process take at most `most` bytes more than it has; on Linux only.

    Raises:
        MemoryError: inside, in Python and in libraries that ask for memory politely.
    """
    held = _address_space_bytes()
    if held is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [held + most, *(each for each in before if each != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def available_bytes() -> int | None:
    """The bytes of memory that could be taken without swapping; None where that is not known."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _address_space_bytes() -> int | None:
    """The size of this process's address space; None on systems that do not bound it."""
    if sys.platform != "linux":
        return None
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            pages = int(file.read(64).split()[0])
    except OSError:
        return None
    import resource

    return pages * resource.getpagesize()

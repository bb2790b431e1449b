"""Where the time from a command to its first update goes, in parts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StartUp:
    """A clock of one start: of a command from the beginning of its process, else of a trainer.

    Attributes:
        parts: seconds of each part, in the order in which they first began.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._began = time.monotonic()
        self._by_command = self._runs = False

    def command_began(self) -> None:
        """Count from the beginning of this process, whose imports so far are the first part."""
        self.parts, self._by_command, self._runs = {}, True, True
        self._began = time.monotonic() - _process_seconds()
        self.imported()

    def imported(self) -> None:
        """Count what went by so far, parts aside, as imports."""
        if self._by_command:
            known = sum(self.parts.values()) - self.parts.get("imports", 0.0)
            self.parts["imports"] = time.monotonic() - self._began - known

    def trainer_began(self) -> None:
        """Count from here, unless a command began already."""
        if not (self._by_command and self._runs):
            self.parts, self._by_command, self._runs = {}, False, True
            self._began = time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time is counted under a name."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - began

    def told(self) -> str | None:
        """One line on the parts, at the end of the first update; None if it was told before."""
        if not self._runs:
            return None
        self._runs = False
        all_s = time.monotonic() - self._began
        parts = {**self.parts, "the rest": all_s - sum(self.parts.values())}
        listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        return f"Start to the end of the first update: {all_s:.1f} s ({listed})"


def _process_seconds() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        import psutil

        return max(0.0, time.time() - psutil.Process().create_time())
    except Exception:  # psutil is there for accelerate, and its errors are its own
        return 0.0


start_up = StartUp()

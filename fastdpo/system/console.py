"""Output on the terminal: progress bars, lines and tables."""

import logging
import re
import sys
import time
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from fastdpo.system import ranks

LOG_INTERVAL_S = 30
"""Seconds between two lines of a progress bar that goes to a log file or a pipe."""


class ProgressLog:
    """A progress bar for what is no terminal: a whole line every `LOG_INTERVAL_S`, or none.

    It has what is used of tqdm's.

    Attributes:
        total: units of the whole work.
        n: units that are done.
    """

    def __init__(self, total: int, description: str | None, unit: str) -> None:
        self.total, self.n = total, 0
        self.unit_scale = False  # of tqdm; numbers are written in full here
        self._description, self._unit, self._postfix = description, unit, ""
        self._began_s = self._said_s = time.monotonic()

    def update(self, done: int = 1) -> None:
        """Count units, and write a line if it is time for one."""
        self.n += done
        now_s = time.monotonic()
        if self._description is None or now_s - self._said_s < LOG_INTERVAL_S:
            return
        self._said_s = now_s
        rate = self.n / (now_s - self._began_s)
        left = duration((self.total - self.n) / rate) if rate else "unknown"
        print_error(
            f"{self._description}: {self.n:,} of {self.total:,} {self._unit}s{self._postfix}, "
            f"{rate:,.1f} a second, {left} left"
        )

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set what stands behind the count."""
        self._postfix = f", {text}"

    def close(self) -> None:
        """End it, without a line."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_bar(total: int, description: str | None, unit: str) -> "tqdm | ProgressLog":
    """A progress bar with rate and time left; in a log, a line every `LOG_INTERVAL_S`.

    Of several ranks only the first shows it.

    Args:
        total: units of the whole work.
        description: label of the bar; None shows no bar.
        unit: name of a unit, for the rate.
    """
    if not ranks.is_first():
        description = None
    if not sys.stderr.isatty():
        return ProgressLog(total, description, unit)
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=description is None,
        leave=False,
        mininterval=0.1,
        maxinterval=1.0,
    )


def duration(seconds: float) -> str:
    """Seconds as minutes:seconds, or as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# What would move the cursor, color the screen or turn the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""A text in which control characters other than newline and tab are written as \u001b."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def print_line(text: str = "", *, colored: bool = False) -> None:
    """Write one line to standard output and flush it; of several ranks only the first does.

    Args:
        text: names of files and columns in it may hold anything: it is made `printable`.
        colored: whether the text holds colors of ours and is printable apart from them.

    A character that the console's encoding lacks is written as `?`.
    """
    if not ranks.is_first():
        return
    line = (text if colored else printable(text)) + "\n"
    try:
        sys.stdout.write(line)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(line.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def print_error(text: str) -> None:
    """Write one line to standard error, made `printable`."""
    sys.stderr.write(printable(text) + "\n")


class LineHandler(logging.StreamHandler):
    """Writes log messages to standard error, made `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """The message of a record as a line that moves no cursor."""
        return printable(super().format(record))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text: the first column aligned to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        first, *others = line
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0]), *cells]).rstrip()

    return "\n".join(
        [aligned(lines[0]), "  ".join("-" * w for w in widths), *map(aligned, lines[1:])]
    )

"""What people see: progress bars, tables, numbers."""

import sys
from collections.abc import Sequence

from tqdm import tqdm

LOG_INTERVAL_S = 30
"""How often a progress bar writes where nobody watches (a log file, a pipe)."""


def progress_bar(total: int, description: str | None, unit: str) -> tqdm:
    """A bar with rate and time left; in a log, a line now and then. No description, no bar."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=description is None,
        leave=not watched,
        mininterval=0.1 if watched else LOG_INTERVAL_S,
        maxinterval=1.0 if watched else LOG_INTERVAL_S,
    )


def print_line(text: str = "") -> None:
    """One line on standard output, at once."""
    write(text + "\n")


def write(text: str) -> None:
    """Write text to standard output at once; what its encoding has no letter for becomes `?`."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def written(line: Sequence[str]) -> str:
        first, *others = line
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0]), *cells]).rstrip()

    return "\n".join(
        [written(lines[0]), "  ".join("-" * w for w in widths), *map(written, lines[1:])]
    )

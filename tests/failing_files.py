"""Let the N-th operation on the disk fail, or the process die there, for tests of what is left.

`fastdpo.system.files.OPERATIONS` are the operations; what transformers writes by itself counts too.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import TrainerState

from fastdpo.system import files


class Killed(BaseException):
    """The process is gone: no operation happens after the one it died in."""


class Disk:
    """Counts operations; lets the one numbered `at` fail, from 0.

    Args:
        at: None only counts.
        code: fail with an OSError of this errno; None dies instead, for good.
        halfway: a write happens first, and the file that it leaves is cut in half.
    """

    def __init__(self, at: int | None, code: int | None = None, halfway: bool = False) -> None:
        self.at, self.code, self.halfway = at, code, halfway
        self.log: list[str] = []
        self.dead = False
        self._depth = 0

    def wrapped(self, name, real):
        def call(*args, **options):
            if self.dead:
                raise Killed
            if self._depth:  # an operation inside one is part of it
                return real(*args, **options)
            number = len(self.log)
            path = next((a for a in args if isinstance(a, str | Path)), "")
            self.log.append(f"{name} {Path(path).name}")
            if number != self.at:
                self._depth += 1
                try:
                    return real(*args, **options)
                finally:
                    self._depth -= 1
            if self.halfway and name in ("_write_bytes", "call_writer", "save_to_json"):
                real(*args, **options)
                cut_newest(Path(path))
            if self.code is None:
                self.dead = True
                raise Killed
            raise OSError(self.code, os.strerror(self.code))

        return call

    def take_over(self, patch: pytest.MonkeyPatch) -> None:
        for name in files.OPERATIONS:
            patch.setattr(files, name, self.wrapped(name, getattr(files, name)))
        real = TrainerState.save_to_json
        own = self.wrapped("save_to_json", lambda path, state: real(state, path))
        patch.setattr(TrainerState, "save_to_json", lambda state, path: own(path, state))


@contextmanager
def failing(at: int | None, code: int | None = None, *, halfway: bool = False) -> Iterator[Disk]:
    """Within, the operation numbered `at` fails with `code`, or kills."""
    disk = Disk(at, code, halfway)
    with pytest.MonkeyPatch.context() as patch:
        disk.take_over(patch)
        yield disk


def cut_newest(path: Path) -> None:
    """Halve a file, or in a folder the one written last."""
    if path.is_dir():
        inside = [each for each in path.rglob("*") if each.is_file()]
        path = max(inside, key=lambda each: each.stat().st_mtime_ns)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


FULL, FAILING = errno.ENOSPC, errno.EIO

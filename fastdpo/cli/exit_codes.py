"""How a command ends: an exit code, and one line that says what arrived and what to do.

Errors of ours say all that themselves. Those of the libraries are told apart here by what a user
can do about them; whatever is left is a fault of this program and keeps its traceback.
"""

import errno
import sys
from typing import NamedTuple

from fastdpo.system.ranks import LostRankError
from fastdpo.version import __version__

EXIT_NOT_FINITE = 1
EXIT_BAD_OPTION = 2
EXIT_DOES_NOT_FIT = 3
EXIT_LOST_RANK = 4
EXIT_OWN_FAULT = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOSPC: "make room there, or name a folder on another disk",
    errno.EDQUOT: "make room there, or name a folder on another disk",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "name a folder that can be read and written to",
    errno.EISDIR: "name a file",
}
_MEMORY_ADVICE = (
    "close other programs, pass a smaller model or --qlora, or lower --max_length; "
    "`python -m fastdpo.plan` shows what a run needs"
)
_LIBRARIES = {
    "safetensors": "a file of weights is damaged or was not downloaded to its end: copy or "
    "download it again",
    "huggingface_hub": "check the name and the connection, or pass a local folder",
    "httpx": "check the connection, or pass a local folder",
    "datasets": "check the data set, or pass its rows as a .jsonl file",
    "pyarrow": "write the table again, or pass its rows as a .jsonl file",
    "pyo3_runtime": "a tokenizer's own code failed: use the tokenizer of the model's original "
    "repository",
}
"""The packages whose errors are about files and connections, with what to do about them."""


class Outcome(NamedTuple):
    """How a command ends that ended in an error.

    Attributes:
        code: the exit code.
        line: what is written to standard error.
        is_own_fault: whether the traceback belongs above the line.
    """

    code: int
    line: str
    is_own_fault: bool = False


def outcome_of(error: BaseException) -> Outcome:
    """Tell bad input, too little memory and faults of ours apart."""
    if isinstance(error, FloatingPointError):
        return Outcome(EXIT_NOT_FINITE, str(error))
    if isinstance(error, LostRankError):
        return Outcome(EXIT_LOST_RANK, str(error))
    if (line := _memory_line(error)) is not None:
        return Outcome(EXIT_DOES_NOT_FIT, line)
    if isinstance(error, ValueError | OSError):
        return Outcome(EXIT_BAD_OPTION, format_error(error))
    if isinstance(error, ImportError) and not _is_ours(error.name):
        return Outcome(EXIT_BAD_OPTION, _missing_package(error))
    package = type(error).__module__.partition(".")[0]
    if package in _LIBRARIES:
        return Outcome(EXIT_BAD_OPTION, f"{_first_line(error)} ({package}); {_LIBRARIES[package]}")
    return Outcome(EXIT_OWN_FAULT, _own_fault(error), is_own_fault=True)


def format_error(error: Exception) -> str:
    """The text of an error; that of a system call names the file and a remedy."""
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.filename}: {error.strerror}" + (f"; {remedy}" if remedy else "")


def _memory_line(error: BaseException) -> str | None:
    """The line for an error that means memory, of the GPU or of the machine; None for others."""
    if isinstance(error, MemoryError):
        text = str(error)
        if type(error).__module__.startswith("fastdpo."):  # it has its own advice
            return text
        return f"out of memory{f' ({text})' if text else ''}: {_MEMORY_ADVICE}"
    if isinstance(error, RuntimeError) and "torch" in sys.modules:
        from fastdpo.system.oom import oom_message

        message = oom_message(error)
        return None if message is None else f"out of memory ({message}): {_MEMORY_ADVICE}"
    return None


def _is_ours(name: str | None) -> bool:
    return (name or "").partition(".")[0] in ("fastdpo", "fastdpo_kernels")


def _missing_package(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    if not package:  # the library says which one, as transformers does
        return f"a package is missing: {_first_line(error)}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package {package} is needed and not installed: pip install {package}, or leave "
            "out the option that needs it"
        )
    return (
        f"the package {package} is installed and cannot be imported ({_first_line(error)}): "
        f"install a version that fits, pip install --upgrade {package}"
    )


def _own_fault(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {_first_line(error)}\nThis is a fault of fastdpo {__version__}, "
        "not of your input. Please report it with the lines above and the command; checkpoints "
        "and stores that were written before are whole."
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__

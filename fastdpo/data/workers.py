"""Making pairs on several cores: processes that are given chunks of rows and send back their pairs.

Each is a new interpreter that imports this room alone: nothing is forked, so threads, locks and a
GPU of the process that trains are out of its reach, and the user's script is not run again. It
takes seconds to start, so small sets are done before any is started. What is made of a chunk does
not depend on where it is made, and chunks come back in their order, so neither do pairs, report and
errors.
"""

import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from fastdpo.system import ranks

if TYPE_CHECKING:
    from fastdpo.data.tokenize import ChunkRow, MadePairs, PairMaker

logger = logging.getLogger(__name__)

STARTED_FOR_SECONDS = 20.0
"""Processes are started where one alone would still take so long."""
STARTED_AFTER_SECONDS = 5.0
"""Where nobody has counted the rows, of a stream, one must have taken so long already."""
_AHEAD = 2
"""Chunks a process that are read ahead, so that none waits."""

_COMMAND = "from fastdpo.data.workers import serve; serve()"


def usual_processes() -> int:
    """All cores that this process may use but one, shared out among the ranks; at least 1."""
    if os.name == "nt":
        return 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, (cores - 1) // ranks.launched())


def on_processes(
    maker: "PairMaker",
    chunks: Iterator[list["ChunkRow"]],
    processes: int | None,
    left: Callable[[], float | None],
) -> Generator["MadePairs"]:
    """Make the pairs of all chunks, in their order: here first, on processes where it takes long.

    Args:
        maker: makes pairs in this process, and shows how other ones are to.
        chunks: the rows; read ahead by a few chunks a process.
        processes: how many; None takes `usual_processes`.
        left: how many times as many rows as were read are left, None where it is not known.

    Raises:
        DataError: of the first row that cannot be used, whoever made it.
        RuntimeError: a process has ended before its work was done.
    """
    processes = usual_processes() if processes is None else processes
    began = time.monotonic()
    for chunk in chunks:
        yield maker.make(chunk)
        if processes > 1 and _is_worth_it(time.monotonic() - began, left()):
            break
    else:
        return
    try:
        workers = _start(processes, bytes(ForkingPickler.dumps(maker.told())))
    except Exception as error:  # a tokenizer may refuse to be sent in its own way
        logger.warning(
            "Pairs are prepared by one process: others cannot be started (%s: %s).",
            type(error).__name__,
            error,
        )
        yield from map(maker.make, chunks)
        return
    try:
        yield from _in_order(workers, chunks)
    finally:
        for worker in workers:
            worker.end()


def _is_worth_it(seconds: float, left: float | None) -> bool:
    if left is None:
        return seconds >= STARTED_AFTER_SECONDS
    return seconds * left >= STARTED_FOR_SECONDS


class _Worker:
    """One process, and the pipes to it."""

    def __init__(self, told: bytes):
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None, "it is a pipe"
        assert self._process.stdout is not None, "it is a pipe"
        self._to = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._from = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._told: bytes | None = told

    def make(self, chunk: list["ChunkRow"]) -> "MadePairs":
        """Let the process make the pairs of a chunk."""
        try:
            if self._told is not None:
                self._to.send_bytes(self._told)
                self._told = None
            self._to.send(chunk)
            result, error = self._from.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"a process that prepares pairs has ended with status {self._process.wait()} "
                "before its work was done (a lack of memory does that): lower --dataset_num_proc, "
                "1 prepares them in this process"
            ) from error
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._to.close()
        self._from.close()
        with self._process:  # closes its pipes, and waits
            pass


def _start(processes: int, told: bytes) -> list[_Worker]:
    if os.name == "nt":
        raise OSError("Windows has other pipes")
    workers: list[_Worker] = []
    try:
        for _ in range(processes):
            workers.append(_Worker(told))
    except OSError:
        for worker in workers:
            worker.end()
        raise
    return workers


def _in_order(workers: list[_Worker], chunks: Iterator[list["ChunkRow"]]) -> Generator["MadePairs"]:
    """Yield the pairs of the chunks in their order; the first error in that order is raised."""
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def make(chunk: list["ChunkRow"]) -> "MadePairs":
        worker = idle.get()
        try:
            return worker.make(chunk)
        finally:
            idle.put(worker)

    waiting: deque[Future[MadePairs]] = deque()
    failed: Exception | None = None
    with ThreadPoolExecutor(len(workers)) as threads:
        try:
            more = True
            while more or waiting:
                while more and len(waiting) < _AHEAD * len(workers):
                    try:
                        waiting.append(threads.submit(make, next(chunks)))
                    except StopIteration:
                        more = False
                    except Exception as error:  # an error of rows before it comes first
                        more, failed = False, error
                if waiting:
                    yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
    if failed is not None:
        raise failed


def serve() -> None:
    """Make pairs of the chunks that come in until no more do; what such a process does."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    orders = Connection(os.dup(0), writable=False)
    answers = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # whatever prints must not print between the answers
    from fastdpo.data.tokenize import PairMaker

    try:
        maker = PairMaker.of_told(orders.recv())
        while True:
            chunk = orders.recv()
            try:
                answer: tuple[Any, Any] = maker.make(chunk), None
            except Exception as error:
                answer = None, ranks.sendable(error)
            answers.send(answer)
    except (EOFError, BrokenPipeError):
        return

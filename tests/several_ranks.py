"""Groups of processes as a launcher starts them, forked from one that has imported everything."""

import multiprocessing
import os
import pickle
import socket
import traceback
from pathlib import Path

_PRELOADED = ["tests.several_ranks", "tests.tiny_trainer", "bitsandbytes"]


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def run_ranks(count, work, folder, *args, timeout_s=240):
    """Call `work(*args)` in `count` processes that form a group; return what each returned.

    Args:
        count: number of ranks; 1 makes no group.
        work: a function of a module of tests.
        folder: where results and outputs go: rank 1 prints into `rank1.out` and `rank1.err`.
        args: arguments of `work`.
        timeout_s: after which all are killed.

    Returns:
        For each rank what `work` returned, or its exit code where it returned nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, count, port, folder, work, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {count} ranks did not end\n{outputs(folder, count)}"
    found = []
    for rank, process in enumerate(processes):
        result = folder / f"rank{rank}.pickle"
        found.append(pickle.loads(result.read_bytes()) if result.exists() else process.exitcode)
        result.unlink(missing_ok=True)
    return found


def outputs(folder, count):
    """What all ranks have written, for the message of a failed test."""
    paths = [folder / f"rank{rank}.{kind}" for rank in range(count) for kind in ("out", "err")]
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in paths if path.exists())


def _rank(rank, count, port, folder, work, args):
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    for kind, number in (("out", 1), ("err", 2)):
        target = os.open(folder / f"rank{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
    try:
        result = work(*args)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))

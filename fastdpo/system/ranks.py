"""The processes of one run, its ranks: what each does alone, and where they come together.

A launcher (torchrun, accelerate launch) starts them and accelerate joins them to a group of
torch.distributed. What communicates here is called by every rank at the same point of its work. In
a single process each function returns what it was given, and torch.distributed is never touched.
"""

import copy
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

BUCKET_BYTES = 2**27
"""Tensors are summed over the ranks in flat buffers of at most this size; an adapter is one."""

_ERROR_KEY = "fastdpo/error"


class LostRankError(RuntimeError):
    """Another process of the run has ended, or does not answer any more."""


@dataclass
class Traffic:
    """The traffic of this process in collectives since it began.

    Attributes:
        tensor_bytes: bytes of gradients and of other tensors that were summed or joined.
        collectives: number of collective operations.
        seconds: time in them, waiting for slower ranks included. On a GPU the host does not wait
            for most of them, so it is a lower bound there.
    """

    tensor_bytes: int = 0
    collectives: int = 0
    seconds: float = 0.0


traffic = Traffic()
_alone = False


def count() -> int:
    """The number of processes in the group, 1 without one, or where this one is `alone`."""
    if _alone:
        return 1
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return 1
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this rank works for itself, as if there were no others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def launched() -> int:
    """The number of processes that a launcher says it has started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def index() -> int:
    """Which of the processes this is, from 0; known before they have joined, too."""
    if count() > 1:
        return sys.modules["torch"].distributed.get_rank()
    return int(os.environ.get("RANK") or 0) if launched() > 1 else 0


def is_first() -> bool:
    """True for the process that prints, saves and writes metrics."""
    return index() == 0


def join() -> None:
    """Join the group that a launcher has started, on this process's GPU; nothing without one."""
    if launched() > 1 and count() == 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Leave the group at the end of a command that went well."""
    if count() > 1:
        import torch

        torch.distributed.destroy_process_group()


def is_first_error() -> bool:
    """Tell whether no rank has had an error before: one cause ends all, and is told once."""
    if count() == 1:
        return is_first()
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return _get_default_store().add(_ERROR_KEY, 1) == 1
    except RuntimeError:  # it went with the rank that held it
        return True


# What one rank does for all


def first_does(work: Callable[[], T]) -> T:
    """Let the first rank do something; all of them get its result, or raise its error.

    Args:
        work: returns what pickle can send.
    """
    if count() == 1:
        return work()
    import torch

    own_error: BaseException | None = None
    sent: list[Any] = [None]
    if is_first():
        try:
            sent = [(work(), None)]
        except BaseException as error:  # of a signal too: nobody may be left waiting
            own_error, sent = error, [(None, sendable(error))]
    with _collective():
        torch.distributed.broadcast_object_list(sent, src=0)
    result, error = cast("tuple[Any, BaseException | None]", sent[0])
    if own_error is not None:
        raise own_error
    if error is not None:
        raise error
    return result


@contextmanager
def held_by_first(held: AbstractContextManager[Any]) -> Iterator[None]:
    """A context that the first rank enters, such as a lock; its error is raised by all ranks."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(held)

        first_does(enter)
        yield


def after_first(work: Callable[[], T]) -> T:
    """Let all ranks do something after the first one has: what it leaves on disk saves them time.

    Args:
        work: must not communicate.
    """
    done: list[T] = []

    def first() -> None:
        done.append(work())

    first_does(first)
    return done[0] if done else work()


def sendable(error: BaseException) -> BaseException:
    """The error, or one with its text where another process could not make it again."""
    try:
        copy.deepcopy(error)  # made again from its arguments, as another process would
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# Where all ranks come together


def gathered(values: Sequence[T]) -> list[T]:
    """The values of all ranks in one list, the first rank's first."""
    if count() == 1:
        return list(values)
    import torch

    lists: list[Any] = [None] * count()
    with _collective():
        torch.distributed.all_gather_object(lists, list(values))
    return [value for each in lists for value in each]


def highest(value: int) -> int:
    """The largest of the ranks' numbers."""
    if count() == 1:
        return value
    import torch

    numbers = torch.tensor([value], dtype=torch.int64, device=_device())
    return int(_reduced(numbers, torch.distributed.ReduceOp.MAX))


def total(value: int) -> int:
    """The sum of the ranks' numbers."""
    if count() == 1:
        return value
    import torch

    return int(summed(torch.tensor([value], dtype=torch.int64, device=_device())))


def summed(tensor: "Tensor") -> "Tensor":
    """The sum of a tensor over the ranks, equal on all to the bit; on its own device."""
    if count() == 1:
        return tensor
    import torch

    return _reduced(tensor, torch.distributed.ReduceOp.SUM)


def joined(tensor: "Tensor") -> "Tensor":
    """The (n, ...) tensors of all ranks, n differing, one after another on their device."""
    if count() == 1:
        return tensor
    import torch

    lengths = summed(
        torch.tensor(
            [len(tensor) if each == index() else 0 for each in range(count())], device=_device()
        )
    ).tolist()
    longest = max(lengths)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]), device=_device())
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    with _collective(padded):
        torch.distributed.all_gather(parts, padded)
    pieces = [part[:length] for part, length in zip(parts, lengths, strict=True)]
    return torch.cat(pieces).to(tensor.device)


def agreed(work: Callable[[], T]) -> T:
    """Do this rank's part of something; where memory runs out on one rank, it does on all.

    So all of them repeat it in smaller parts, and none waits in a later collective for one that has
    given up. `work` must not communicate.

    Raises:
        RuntimeError: out of memory, here or on the rank that the message names.
    """
    if count() == 1:
        return work()
    from fastdpo.system.oom import free_cached_memory, oom_message

    message, result = None, None
    try:
        result = work()
    except RuntimeError as error:
        message = oom_message(error)
        if message is None:
            raise
    if message is not None:  # the exception, which held the tensors, is gone
        free_cached_memory()
    failed = highest(0 if message is None else index() + 1)
    if failed:
        del result
        raise RuntimeError(message or f"out of memory on rank {failed - 1}")
    return result  # pyrefly: ignore


class TensorSum:
    """Sums tensors over the ranks, in flat buffers that it needs no memory for later on.

    Args:
        tensors: what is summed in place, contiguous; the same number, shapes and order on all.
    """

    def __init__(self, tensors: Sequence["Tensor"]) -> None:
        self.buckets = _buckets(tensors)
        sizes: dict[tuple[Any, Any], int] = {}
        for bucket in self.buckets:
            if len(bucket) > 1:
                kind = (bucket[0].dtype, bucket[0].device)
                sizes[kind] = max(sizes.get(kind, 0), sum(each.numel() for each in bucket))
        self.buffers = {
            kind: tensors[0].new_empty(size, dtype=kind[0], device=kind[1])
            for kind, size in sizes.items()
        }

    def run(self) -> None:
        """Sum them up, bucket by bucket."""
        for bucket in self.buckets:
            if len(bucket) == 1:
                bucket[0].copy_(summed(bucket[0].contiguous()))
                continue
            flat = self.buffers[bucket[0].dtype, bucket[0].device]
            flat = flat[: sum(each.numel() for each in bucket)]
            parts = flat.split([each.numel() for each in bucket])
            for part, each in zip(parts, bucket, strict=True):
                part.copy_(each.reshape(-1))
            flat = summed(flat)
            parts = flat.split([each.numel() for each in bucket])
            for part, each in zip(parts, bucket, strict=True):
                each.copy_(part.view_as(each))


def sent_by_first(tensors: Sequence["Tensor"]) -> None:
    """Give every rank the first one's values of some tensors, in place."""
    if count() == 1:
        return
    import torch

    for tensor in tensors:
        moved = tensor.detach().to(_device()).contiguous()
        with _collective(moved):
            torch.distributed.broadcast(moved, src=0)
        with torch.no_grad():
            tensor.copy_(moved)


def _buckets(tensors: Sequence["Tensor"]) -> list[list["Tensor"]]:
    """The tensors in order, in runs of one dtype and device of at most `BUCKET_BYTES`."""
    buckets: list[list[Tensor]] = []
    room, kind = 0, None
    for tensor in tensors:
        its_kind = (tensor.dtype, tensor.device)
        if its_kind != kind or tensor.nbytes > room:
            buckets.append([])
            room, kind = BUCKET_BYTES, its_kind
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets


def _reduced(tensor: "Tensor", operation: Any) -> "Tensor":
    """All-reduce a tensor: in place where the group's backend reaches it, else in a copy."""
    import torch

    moved = tensor.to(_device())
    with _collective(moved):
        torch.distributed.all_reduce(moved, op=operation)
    return moved.to(tensor.device)


def _device() -> "torch.device":
    """Where the group's backend wants its tensors."""
    import torch

    if "nccl" in torch.distributed.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _ignore_launcher() -> None:
    """Let this rank say why it ends: the launcher, too, has seen the loss and ends the others."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _collective(tensor: "Tensor | None" = None) -> Iterator[None]:
    """Count a collective, and tell a lost rank from other errors.

    Raises:
        LostRankError: another rank has ended or does not answer.
    """
    from fastdpo.system.oom import oom_message

    began = time.perf_counter()
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's have no other type in common
        if oom_message(error) is not None:
            raise
        _ignore_launcher()
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = re.sub(r"^\[[^]]*\] *", "", line).split(". ")[0]  # without gloo's file and advice
        raise LostRankError(
            f"another process of this run has ended or does not answer ({reason}), so rank "
            f"{index()} of {count()} ends too. Checkpoints and stored reference log-probs are "
            "whole: the same command with --resume_from_checkpoint true goes on, with this or "
            "another number of processes."
        ) from error
    finally:
        traffic.collectives += 1
        traffic.seconds += time.perf_counter() - began
        traffic.tensor_bytes += 0 if tensor is None else tensor.nbytes

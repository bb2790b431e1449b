"""Attention that a recomputed layer does not run twice: its results are kept from the first time.

torch's selective activation checkpointing, around the attention alone: no other operation of the
layer passes through a dispatch mode. What is kept is what the kernel returns, the output and the
log-sum-exp of each query and head; its inputs are recomputed with the rest of the layer.
"""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_mode: ContextVar[AbstractContextManager[Any] | None] = ContextVar("_mode", default=None)


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for `torch.utils.checkpoint.checkpoint`, whose `context_fn` this is.

    In the first, attention kernels leave what they return; in the second they return it again
    without being run. A graph can then be differentiated once only.
    """
    leaving, returning = create_selective_checkpoint_contexts(_policy)
    return _AttendIn(leaving), _AttendIn(returning)


def keeps_attention() -> bool:
    """Tell whether the layer that runs keeps its attention, in its first run or the second."""
    return _mode.get() is not None


def attention_mode(dropout: float) -> AbstractContextManager[Any]:
    """The context in which a backend is to call its kernel, entered once by a layer.

    Nothing may be called in it that the recomputation does not call again, since what is kept is
    found by its order. Attention with dropout is always run again: the random numbers drawn after
    it depend on it.
    """
    mode = _mode.get()
    return nullcontext() if mode is None or dropout else mode


class _AttendIn:
    """A context in which `attention_mode` is another one."""

    def __init__(self, mode: AbstractContextManager[Any]) -> None:
        self._inner = mode
        self._before: list[Token[AbstractContextManager[Any] | None]] = []

    def __enter__(self) -> None:
        self._before.append(_mode.set(self._inner))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _mode.reset(self._before.pop())


def _policy(_context: Any, operation: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    name = operation.name() if isinstance(operation, OpOverload) else ""
    kernel = "attention" in name or "attn" in name  # torch's, and those of the flash-attn packages
    return CheckpointPolicy.MUST_SAVE if kernel else CheckpointPolicy.PREFER_RECOMPUTE

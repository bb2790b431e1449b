"""Out of memory: how to recognize it, and how to free what the failed work held."""

import gc

import torch

_MARKS = ("out of memory", "ALLOC_FAILED", "allocate memory", "enough memory", "bad_alloc")
"""Words that the messages of CUDA, cuBLAS and torch's CPU allocator have in common."""


class DoesNotFitError(MemoryError):
    """Not even a single completion fits into the memory of the device."""

    @classmethod
    def of_completion(cls, tokens: int, message: str) -> "DoesNotFitError":
        """The error for a completion that does not fit, with advice.

        Args:
            tokens: tokens of the completion and its prompt.
            message: the allocator's message.
        """
        return cls(
            f"a single completion with its prompt, {tokens:,} tokens, does not fit into the "
            f"memory that there is ({message}). Lower --max_length, or use --qlora; "
            "`python -m fastdpo.plan` shows what fits which GPU."
        )


def oom_message(error: RuntimeError) -> str | None:
    """The first line of an error that means too little memory, GPU or CPU; None for others."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(mark in text for mark in _MARKS):
        return text.split("\n")[0]
    return None


def free_cached_memory() -> None:
    """Free unreferenced tensors; call it after the exception is gone, as it holds frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

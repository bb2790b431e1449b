"""When memory runs out: how to know it, and how to give back what the failed work held."""

import gc

import torch


class DoesNotFitError(MemoryError):
    """Not even a single completion fits into the memory that there is."""

    @classmethod
    def of_completion(cls, tokens: int, message: str) -> "DoesNotFitError":
        """A completion and its prompt are too much: what to do.

        Args:
            tokens: of both.
            message: what the allocator said.
        """
        return cls(
            f"a single completion with its prompt, {tokens:,} tokens, does not fit into the "
            f"memory that there is ({message}). Lower --max_length, or use --qlora; "
            "`python -m fastdpo.plan` shows what fits which GPU."
        )


def oom_message(error: RuntimeError) -> str | None:
    """The first line of an error that a lack of memory on the GPU has raised; None of others."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(
        mark in text for mark in ("out of memory", "ALLOC_FAILED")
    ):
        return text.split("\n")[0]
    return None


def free_cached_memory() -> None:
    """Free what nothing refers to; to be called with the exception gone, which holds frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Embeddings served from host memory: a frozen table of which the GPU needs few vectors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.head import unwrap_model

logger = logging.getLogger(__name__)


class HostEmbedding(nn.Embedding):
    """A frozen embedding whose table lies in host memory, pinned where there is CUDA.

    The vectors of a batch's ids are gathered there and sent to the ids' device, so the numbers are
    those of the table on the GPU. The table is no parameter any more (it says nothing about where
    the model computes, and `.to(device)` must not move it back), but keeps its name and place in
    the state dict.
    """

    weight: Tensor  # (V, H), on the CPU  # pyrefly: ignore
    host_ids: Tensor | None = None  # within `ids_on_host`, the ids of the call on the CPU

    def forward(self, input: Tensor) -> Tensor:
        """The embeddings (..., H) of ids (...), on the ids' device."""
        known = self.host_ids is not None and self.host_ids.shape == input.shape
        ids = self.host_ids if known else input.cpu()  # which waits for the device
        assert ids is not None, "one of them is there"
        vectors = torch.empty(
            ids.numel(), self.embedding_dim, dtype=self.weight.dtype, pin_memory=input.is_cuda
        )
        torch.index_select(self.weight, 0, ids.view(-1), out=vectors)
        sent = vectors.to(input.device, non_blocking=True)
        return sent.view(*input.shape, self.embedding_dim)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


@contextmanager
def ids_on_host(model: nn.Module, input_ids: Tensor | None) -> Iterator[None]:
    """Let a `HostEmbedding` take the ids of a pass from the host, where they were already.

    Args:
        model: a causal LM or a PeftModel on it.
        input_ids: (R, L) int64 on the CPU, equal to those that the model is given; None if they
            are not known there.
    """
    table: Any = unwrap_model(model).get_input_embeddings()
    if type(table) is not HostEmbedding:
        yield
        return
    table.host_ids = input_ids
    try:
        yield
    finally:
        table.host_ids = None


def embeddings_to_host(model: nn.Module) -> int:
    """Serve the input embeddings from host memory, in place; doing it twice does no harm.

    Args:
        model: a causal LM or a PeftModel on it.

    Returns:
        Bytes that the GPU no longer holds; 0 where the model cannot do it, with a warning: the
        head shares the table (then it must lie on the GPU), it is trained, or it is no plain
        `nn.Embedding`.
    """
    causal_lm = unwrap_model(model)
    table: Any = causal_lm.get_input_embeddings()
    if type(table) is HostEmbedding:
        return 0
    if reason := _why_not(table, causal_lm.get_output_embeddings()):
        logger.warning("The embeddings stay on the GPU: %s.", reason)
        return 0
    weight = table.weight.detach()
    del table.weight
    table.__class__ = HostEmbedding
    on_host = weight.cpu()
    table.weight = on_host.pin_memory() if torch.cuda.is_available() else on_host
    return weight.nbytes


def _why_not(table: nn.Module, head: nn.Module | None) -> str | None:
    if type(table) is not nn.Embedding or table.max_norm is not None:
        return f"they are a {type(table).__name__} with a forward of its own"
    if head is not None and getattr(head, "weight", None) is table.weight:
        return "the head shares the table, and needs it there"
    if table.weight.requires_grad:
        return "they are trained"
    return None

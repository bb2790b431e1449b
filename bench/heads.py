"""The contenders of the head op: hidden states, head and targets to log-probs, each in its own way.

A contender gives (N,) log-probs where it can, else their sum, which is all its users may ask for.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HeadOp = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(N, H) states, (V, H) head, (N,) targets -> (N,) log-probs or () their sum."""

METRIC_OUTPUTS = ("entropy", "mean_logits", "is_top1")
"""The figures that DPO logs; TRL computes them in every update, fastdpo in those that log."""

ROWS = 1024
"""Rows that `bare GEMMs` and `torch logits` work at a time, so that their logits fit."""


def fastdpo(**options: Any) -> HeadOp:
    """Ours, or a form of it."""
    from fastdpo_kernels import linear_logprobs

    return lambda states, weight, targets: linear_logprobs(
        states, weight, targets, ignore_index=None, **options
    )


def fastdpo_with_figures() -> HeadOp:
    """Ours in an update that logs."""
    from fastdpo_kernels import linear_logprobs

    return lambda states, weight, targets: (
        linear_logprobs(
            states, weight, targets, ignore_index=None, outputs=METRIC_OUTPUTS
        ).token_logps
    )


def _trl(outputs: tuple[str, ...]) -> HeadOp:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    chunk_columns = 32768  # what TRL 1.16's fused head calls it with

    def op(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            states, weight, None, targets, 1.0, chunk_columns, None, 1.0, outputs
        )[0]

    return op


def trl() -> HeadOp:
    """TRL 1.16's chunked log-probs, nothing else asked for."""
    return _trl(())


def trl_with_figures() -> HeadOp:
    """The same as TRL's DPOTrainer calls it."""
    return _trl(METRIC_OUTPUTS)


def torch_chunked() -> HeadOp:
    """torch.nn.functional.linear_cross_entropy in chunks; it knows sums and means only."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda states, weight, targets: (
        -F.linear_cross_entropy(states, weight, targets, reduction="sum", options=options)
    )


def torch_logits() -> HeadOp:
    """All logits at once, in fp32: what a plain implementation does."""

    def op(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(states, weight).float()
        return torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)

    return op


def liger() -> HeadOp:
    """Liger-Kernel's fused linear cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda states, weight, targets: -loss(weight, states, targets)


def cut_cross_entropy() -> HeadOp:
    """Apple's cut-cross-entropy, its gradient filter on as it comes."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda states, weight, targets: (
        -linear_cross_entropy(states, weight, targets, reduction="none")
    )


HEADS: dict[str, Callable[[], HeadOp]] = {
    "fastdpo": fastdpo,
    "fastdpo skipping": partial(fastdpo, backend="triton", skip_mass=1e-3),
    "fastdpo low memory": partial(fastdpo, backend="triton", max_buffer_mib=64),
    "fastdpo portable": partial(fastdpo, backend="torch"),
    "fastdpo with figures": fastdpo_with_figures,
    "trl": trl,
    "trl with figures": trl_with_figures,
    "torch linear_cross_entropy": torch_chunked,
    "torch logits": torch_logits,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
"""How to build each contender, where `reason_missing` knows no reason against it."""

QUICK_HEADS = ("fastdpo", "trl", "torch linear_cross_entropy", "torch logits", "liger")
QUICK_HEADS += ("cut-cross-entropy",)

NEEDS = {
    "fastdpo skipping": ("triton", "triton", True),
    "fastdpo low memory": ("triton", "triton", True),
    "trl": ("trl", "trl", False),
    "trl with figures": ("trl", "trl", False),
    "liger": ("liger_kernel", "liger-kernel", True),
    "cut-cross-entropy": ("cut_cross_entropy", "cut-cross-entropy", True),
}
"""Module, package, and whether it runs on CUDA alone."""

BARE_GEMMS = "bare GEMMs"


def bare_gemms(states: Tensor, weight: Tensor, gemms: int) -> None:
    """The matrix products that the op cannot do without, and nothing else.

    1 for the score, 2 with the gradient of the states, 3 with that of the head too; a tile of
    logits at a time.
    """
    logits = states.new_empty((min(ROWS, len(states)), len(weight)))
    grad_weight = torch.zeros_like(weight) if gemms > 2 else None
    for rows in states.split(ROWS):
        tile = logits[: len(rows)]
        torch.mm(rows, weight.T, out=tile)
        if gemms > 1:
            torch.mm(tile, weight)
        if grad_weight is not None:
            grad_weight.addmm_(tile.T, rows)


def reason_missing(contender: str) -> str | None:
    """Why a contender cannot run on this machine, found without building it; None if it can."""
    module, package, wants_cuda = NEEDS.get(contender, ("torch", "torch", False))
    if find_spec(module) is None:
        return f"{package} is not installed"
    if wants_cuda and not torch.cuda.is_available():
        return f"{package} is installed but needs a CUDA device"
    if contender == "torch linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return None

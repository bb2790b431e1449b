"""Preference losses: pure functions of log-ratios, one formula each."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def sigmoid(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """DPO loss: minus log sigmoid of beta x margin, the margin being chosen less rejected logratio.

    Args:
        chosen_logratios: (B,) policy less reference log-prob of the chosen completion, nats.
        rejected_logratios: (B,), likewise of the rejected one.
        beta: inverse temperature of the implied reward.

    Returns:
        (B,) loss per pair, in the dtype of the log-ratios.

    Source: arXiv:2305.18290, equation 7.
    """
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": sigmoid}
"""Every built loss by the name that TRL gives it."""

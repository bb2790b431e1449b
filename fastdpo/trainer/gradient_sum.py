"""The gradients of the trained parameters, summed over the ranks of a run once an update."""

from collections.abc import Sequence

import torch
from torch import nn

from fastdpo.system import ranks


class GradientSum:
    """A sum that has all memory that it needs, so that no rank can fail once others wait for it.

    Args:
        parameters: of the policy, after the backward of this rank's part of an update. Where there
            are other ranks, a trained one without a gradient gets one of zeros, because another
            rank may have one.

    Attributes:
        used: (P,) float64, 1 for each trained parameter that this rank has a gradient for; only
            where there are other ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        if ranks.count() == 1:
            return
        self.parameters = [p for p in parameters if p.requires_grad]
        device = self.parameters[0].device
        used = [float(parameter.grad is not None) for parameter in self.parameters]
        self.used = torch.tensor(used, dtype=torch.float64, device=device)
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._sum = ranks.TensorSum(gradients)

    def run(self, used: torch.Tensor) -> None:
        """Give every rank the sum of the gradients, and none where no rank had one.

        Args:
            used: the sum of all ranks' `used`.
        """
        self._sum.run()
        for parameter, count in zip(self.parameters, used.tolist(), strict=True):
            if not count:
                parameter.grad = None

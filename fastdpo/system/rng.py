"""The state of the random generators that a forward draws from, to repeat it exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RNGState:
    """torch's generators on the CPU and on the GPU in use, at one moment."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls) -> "RNGState":
        """The generators' present state."""
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if on_cuda else None)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

"""A backward that runs out of memory half way."""

from contextlib import contextmanager

import torch

from fastdpo.modeling.activations import decoder_layers


@contextmanager
def backward_breaks_off(model, at):
    """Let the backward of the `at`-th MLP that is reached, counted from 1, run out of memory."""
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("injected")

    hooks = [layer.mlp.register_full_backward_hook(fail) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

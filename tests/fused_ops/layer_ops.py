"""What the tests of a layer's ops share."""

import torch


def normal(*shape, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def error(got, want):
    """Of the norms: what rounding leaves, whatever single entries do."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300)).item()


def saved_by(run):
    """The tensors that autograd keeps of a call."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Error of a value or gradient against fp64: a few roundings of the dtype."""

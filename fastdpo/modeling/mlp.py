"""Which MLPs can be run tile by tile: the gated ones of Llama and its relatives."""

from torch import nn

from fastdpo.modeling.activations import decoder_layers
from fastdpo.modeling.tiles import run_in_tiles

_PARTS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))


def tile_mlps(model: nn.Module, tile_tokens: int | None) -> int:
    """Run the MLPs of the decoder over tiles, in place; a later call changes the size.

    Exact to rounding, the products having fewer rows. The inside of an MLP (the two projections up,
    the activation and their product, with their gradients) exists for one tile at a time.

    Args:
        model: a causal LM or a PeftModel on it.
        tile_tokens: most tokens of a tile; None runs every MLP over the whole row again.

    Returns:
        How many MLPs there are: gated ones; others stay as they are.
    """
    gated = (
        module
        for layer in decoder_layers(model)
        for module in list(layer.modules())
        if any(_has(module, parts) for parts in _PARTS)
    )
    return run_in_tiles(gated, tile_tokens)


def _has(module: nn.Module, parts: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Module) for part in parts)

"""Which norms can be run tile by tile: all over the hidden states, in the decoder."""

from torch import nn

from fastdpo.modeling.activations import decoder_layers
from fastdpo.modeling.head import backbone_of
from fastdpo.modeling.tiles import run_in_tiles


def tile_norms(model: nn.Module, tile_tokens: int | None) -> int:
    """Run the decoder's norms over tiles, in place; a later call changes the size.

    transformers' norms compute in fp32: they save a copy of their input in it, and their backward
    holds about five more. Over tiles they save the input itself, and the copies exist for one tile
    at a time. Values are the same bit for bit; gradients in bf16 too, in fp32 to rounding.

    Args:
        model: a causal LM or a PeftModel on it.
        tile_tokens: most tokens of a tile; None runs every norm over the whole row again.

    Returns:
        How many norms there are.
    """
    backbone = backbone_of(model)
    modules = [m for layer in decoder_layers(model) for m in layer.modules()]
    modules += backbone.children()  # the last norm
    return run_in_tiles((m for m in modules if _is_norm(m)), tile_tokens)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("Norm")
    return named and isinstance(weight, nn.Parameter) and weight.ndim == 1

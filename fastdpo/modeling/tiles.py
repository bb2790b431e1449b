"""Modules that work on each token alone, run tile by tile along the sequence.

What is inside such a module is then never there for all tokens. Its forward saves its input only;
its backward runs a tile forward and backward again before it takes the next.

One call is two autograd nodes, joined by a proxy: a tensor of the output's shape that holds one
number (expanded, so it costs nothing) and exists for dL/dout to travel along.

    forward       hidden ----> _TiledBackward ----> proxy ----> _TiledForward ----> out
                               saves hidden                     computes out, tile by tile,
                                                                and saves nothing
    backward   dL/dhidden <--- _TiledBackward <--- dL/dout <--- _TiledForward <--- dL/dout
               dL/dweights     runs the tiles again             hands it on as it is

A single node would work too, but not in a layer that is recomputed: checkpointing stops the second
forward as soon as all saved tensors are there again. With the input saved before anything is
computed, the recomputation ends before the tiles run, so they run twice in all and not three times.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdpo.modeling.activations import decoder_layers
from fastdpo.modeling.families import Family, family_of, is_gated_mlp, is_norm
from fastdpo.modeling.fused import runs_fused
from fastdpo.modeling.head import get_backbone, unwrap_model
from fastdpo.system.rng import RNGState


def run_in_tiles(modules: Iterable[Any], tile_tokens: int | None) -> int:
    """Run modules over at most `tile_tokens` tokens at once, in place; may be called again.

    Args:
        modules: modules in which each token's output depends on that token's input alone. Those
            whose forward takes more than the hidden states stay as they are.
        tile_tokens: most tokens of a tile; None runs them over all tokens at once again.

    Returns:
        How many modules run in tiles from now on.
    """
    count = 0
    for module in modules:
        if not isinstance(module, _TiledModule):
            if len(inspect.signature(type(module).forward).parameters) != 2:
                continue
            module.__class__ = _tiled(type(module))
        module.tile_tokens = tile_tokens
        count += 1
    return count


class _TiledModule:
    tile_tokens: int | None

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        run = super().forward  # pyrefly: ignore
        if (
            self.tile_tokens is None
            or hidden_states.shape[_axis(hidden_states)] <= self.tile_tokens
        ):
            return run(hidden_states)
        tiles = _Tiles(run, hidden_states.device.type, self.tile_tokens)
        parameters = [p for p in self.parameters() if p.requires_grad]
        differentiable = any(t.requires_grad for t in (hidden_states, *parameters))
        if not (torch.is_grad_enabled() and differentiable):
            return tiles.value(hidden_states)
        proxy = _TiledBackward.apply(tiles, hidden_states, *parameters)
        return _TiledForward.apply(proxy, tiles, hidden_states.detach())


@functools.cache
def _tiled(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Tiled{kind.__name__}", (_TiledModule, kind), {})


class _Tiles:
    """One call of a tiled module, with the autocast and random state that it began under.

    Autocast keeps no cast weights here: one made without gradient would be reused with it.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], device: str, tile_tokens: int) -> None:
        self.run, self.tile_tokens = run, tile_tokens
        self.random = RNGState.capture()
        self._autocast = functools.partial(
            torch.autocast,
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
            cache_enabled=False,
        )

    def value(self, hidden_states: Tensor) -> Tensor:
        """Compute the output without gradients, tile by tile.

        Args:
            hidden_states: (T, H), (1, T, H) or (1, T, heads, H).

        Returns:
            A tensor of that shape.
        """
        out = None
        with torch.no_grad(), self._autocast():
            for tokens in self._slices(hidden_states):
                tile = self.run(hidden_states[tokens])
                if out is None:
                    out = tile.new_empty(hidden_states.shape)
                out[tokens] = tile
        assert out is not None, "more tokens than a tile are some"
        return out

    def gradients(
        self, hidden_states: Tensor, parameters: tuple[Tensor, ...], grad_out: Tensor
    ) -> list[Tensor | None]:
        """Run every tile forward and backward, drawing the forward's random numbers again.

        Returns:
            The gradient of the hidden states, or None where they need none, and one for each
            parameter, or None where the module does not use it.
        """
        totals: list[Tensor | None] = [None] * len(parameters)
        needs_input = hidden_states.requires_grad
        grad_hidden = torch.empty_like(hidden_states) if needs_input else None
        after = RNGState.capture()
        self.random.restore()
        for tokens in self._slices(hidden_states):
            leaf = hidden_states[tokens].detach().requires_grad_(needs_input)
            with torch.enable_grad(), self._autocast():
                tile = self.run(leaf)
            leaves = ([leaf] if needs_input else []) + list(parameters)
            grads = list(torch.autograd.grad(tile, leaves, grad_out[tokens], allow_unused=True))
            if grad_hidden is not None:
                grad_hidden[tokens] = grads.pop(0)
            for index, grad in enumerate(grads):
                total = totals[index]
                totals[index] = grad if total is None else total.add_(grad)
        after.restore()
        return [grad_hidden, *totals]

    def _slices(self, hidden_states: Tensor) -> list[tuple[slice, ...]]:
        axis = _axis(hidden_states)
        starts = range(0, hidden_states.shape[axis], self.tile_tokens)
        before = (slice(None),) * axis
        return [(*before, slice(start, start + self.tile_tokens)) for start in starts]


def _axis(hidden_states: Tensor) -> int:
    """The axis that tokens lie along: the second where there is a batch."""
    return 1 if hidden_states.ndim > 2 else 0


class _TiledBackward(torch.autograd.Function):
    """Saves the input and computes every gradient; its output is the proxy."""

    @staticmethod
    def forward(ctx: Any, tiles: _Tiles, hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.tiles, ctx.parameters = tiles, parameters
        ctx.save_for_backward(hidden_states)
        return hidden_states.new_empty(()).expand(hidden_states.shape)  # holds one number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        (hidden_states,) = ctx.saved_tensors
        hidden_states = hidden_states.detach().requires_grad_(ctx.needs_input_grad[1])
        return None, *ctx.tiles.gradients(hidden_states, ctx.parameters, grad_outputs[0])


class _TiledForward(torch.autograd.Function):
    """Computes the output and saves nothing; hands dL/dout on to the proxy."""

    @staticmethod
    def forward(ctx: Any, proxy: Tensor, tiles: _Tiles, hidden_states: Tensor) -> Tensor:
        return tiles.value(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        return grad_outputs[0], None, None


def tile_mlps(model: nn.Module, tile_tokens: int | None) -> int:
    """Run the MLPs of the decoder over tiles, in place; a later call changes the size.

    Exact to rounding: the matrix products are smaller. The inside of an MLP (the two
    projections up, the activation and their product, with their gradients) exists for one tile at a
    time.

    Args:
        model: a causal LM or a PeftModel on it.
        tile_tokens: most tokens of a tile; None runs every MLP over all tokens at once again.

    Returns:
        How many MLPs there are: gated ones; others stay as they are.
    """
    family = _family(model)
    gated = (
        module
        for layer in decoder_layers(model)
        for module in list(layer.modules())
        if is_gated_mlp(module, family)
    )
    return run_in_tiles(gated, tile_tokens)


def tile_norms(model: nn.Module, tile_tokens: int | None) -> int:
    """Run the decoder's norms over tiles, in place; a later call changes the size.

    transformers' norms compute in fp32: they save a copy of their input in it, and their backward
    holds about five more. Over tiles they save the input itself, and the copies exist for one tile
    at a time. Values are the same bit for bit; gradients in bf16 too, in fp32 to rounding.

    Args:
        model: a causal LM or a PeftModel on it.
        tile_tokens: most tokens of a tile; None runs every norm over all tokens at once again.

    Returns:
        How many norms run so: those that transformers computes. A fused norm saves its input
        itself and holds nothing in fp32 but a row, so it runs over all tokens at once.
    """
    backbone = get_backbone(model)
    modules = [m for layer in decoder_layers(model) for m in layer.modules()]
    modules += backbone.children()  # the last norm
    family = _family(model)
    norms = [m for m in modules if is_norm(m, family)]
    run_in_tiles((m for m in norms if runs_fused(m) and isinstance(m, _TiledModule)), None)
    return run_in_tiles((m for m in norms if not runs_fused(m)), tile_tokens)


def _family(model: nn.Module) -> Family:
    return family_of(unwrap_model(model).config.get_text_config())

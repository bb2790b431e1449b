"""Frozen weights in host memory: a decoder layer's matrices are on the GPU while it computes.

LoRA never changes the base, so the base need not lie on the GPU. The matrices of a layer (of a few
consecutive ones, where they are small) are a block. Block i is copied into buffer i mod S of S
buffers, on a stream of its own beside the computation. With two buffers and four layers of a block
each, F being the forward of a layer, B its backward (its recomputation included) and c the copy of
its block:

    compute stream        F0    F1    F2    F3    B3    B2    B1    B0
    copy stream     c0    c1    c2    c3                c1    c0
    buffer 0        0     0     2     2     2     2     2     0     0
    buffer 1              1     1     3     3     3     1     1     1

A copy is begun when the layer is that follows the buffer's last user, and waits for all that was
queued until then. So S buffers are filled S - 1 blocks ahead, and the last S blocks of a forward
need no copy for their backward, nor the first S for the next forward. S buffers thus do what S
resident blocks would.

This is a property of the decoder layer: a hook before its forward asks for its matrices, which a
recomputation repeats, and one before the last node of its forward asks for them in the backward;
the autograd engine runs nodes in the reverse order of their making, so everything of the layer
above has run by then. Every activation plan works with it as it is. A block has the same buffer
all the time: whatever autograd saved of its matrices, a transposed view for example, holds them
again when its backward begins.

The model's tensors stay the objects that they are. Each points to the block's buffer as long as the
buffer holds the block, and else to host memory; so whoever reads them, at any time and after any
failure, reads the weights. Whoever writes to them in place (PEFT's merging does) must release the
buffers first, which are copies: `writable_weights`.
"""

import logging
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.activations import decoder_layers, supports_checkpointing
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.host_blocks import (
    LEAST_BUFFERS,
    Buffer,
    Copies,
    HostBlock,
    aligned,
    layers_per_block,
    offsets_in_block,
)

logger = logging.getLogger(__name__)

FORWARD, BACKWARD = 1, -1


class HostWeights:
    """The matrices of a model's decoder layers in host memory, and their buffers on the device.

    Args:
        layers: decoder layers in order. Their matrices become frozen and are no parameters any more
            (they say nothing about where the model computes, and `.to(device)` must not move them),
            but keep their names, and their places in the state dict.
        device: where the layers compute.

    Attributes:
        device: where the layers compute.

    Raises:
        MemoryError: the host cannot pin so much memory.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._copies = Copies(device)
        self._buffers: list[Buffer] = []
        self._last = (-1, FORWARD)
        shared = _in_several(layers)
        count = layers_per_block(_largest_layer(layers, shared))
        self._blocks = [
            _Block(layers[first : first + count], device, shared)
            for first in range(0, len(layers), count)
        ]
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(_BeforeForward(self, index // count))
            layer.register_forward_hook(_AfterForward(self, index // count))

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(block.host.nbytes for block in self._blocks)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def use_buffers(self, count: int) -> None:
        """Take so many buffers, at least two and at most one a block; the former ones are freed.

        Not between a forward and its backward, which needs what was saved of the buffers.
        """
        count = min(max(count, LEAST_BUFFERS), len(self._blocks))
        if count == len(self._buffers):
            return
        self.release()
        sizes = [max(b.host.nbytes for b in self._blocks[first::count]) for first in range(count)]
        with torch.inference_mode(False):
            buffers = [Buffer(torch.empty(n, dtype=torch.uint8, device=self.device)) for n in sizes]
            for number, block in enumerate(self._blocks):
                block.take_buffer(buffers[number % count].memory)
        for buffer in buffers:
            self._copies.own(buffer.memory)
        self._buffers = buffers

    def release(self) -> None:
        """Free the buffers; the next layer that computes takes two."""
        for block in self._blocks:
            block.drop_buffer()
        self._buffers, self._last = [], (-1, FORWARD)

    def before_forward(self, block: int) -> None:
        """Have a block's matrices on the device for a layer's forward, or for its recomputation."""
        if self._last != (block, BACKWARD):
            self._use(block, FORWARD)

    def before_backward(self, block: int) -> None:
        """Have a block's matrices on the device for a layer's recomputation and backward."""
        self._use(block, BACKWARD)

    def _use(self, block: int, direction: int) -> None:
        if not self._buffers:
            self.use_buffers(LEAST_BUFFERS)
        buffer = self._buffer_of(block)
        if buffer.block != block:
            self._fetch(block)
        if not buffer.is_in_use:
            self._copies.wait(buffer.copied)
            self._blocks[block].enter_buffer()
            buffer.is_in_use = True
        self._last = block, direction  # only now: it says that the block is there
        wanted = {id(buffer)}
        for following in self._following(block, direction):
            buffer = self._buffer_of(following)
            if id(buffer) in wanted:
                break  # of a block that comes before it
            wanted.add(id(buffer))
            if buffer.block != following:
                self._fetch(following)

    def _following(self, block: int, direction: int) -> Iterator[int]:
        """The blocks that come next, one for each further buffer.

        In passes without gradients the first ones come again after the last. (A backward has
        gradients turned off too.)
        """
        count = len(self._blocks)
        for distance in range(1, len(self._buffers)):
            following = block + direction * distance
            if 0 <= following < count:
                yield following
            elif direction == FORWARD and not torch.is_grad_enabled():
                yield following % count
            else:
                break

    def _buffer_of(self, block: int) -> Buffer:
        return self._buffers[block % len(self._buffers)]

    def _fetch(self, block: int) -> None:
        """Begin the copy of a block into its buffer, whoever's it is now."""
        buffer = self._buffer_of(block)
        buffer.is_in_use = False
        if buffer.block is not None:
            self._blocks[buffer.block].leave_buffer()
        buffer.block = None  # until the copy has begun: it may fail
        buffer.copied = self._copies.start(buffer.memory, self._blocks[block].host)
        buffer.block = block


class _Block:
    """The matrices of consecutive decoder layers in one block of host memory."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, shared: set[int]) -> None:
        self._tensors: list[Tensor] = []
        for module, name, weight in _own_matrices(layers, shared):
            self._tensors += _parts(weight)
            _tables_to(weight, device)
            _unregister(module, name, weight.requires_grad_(False))
        self._offsets, size = offsets_in_block([tensor.nbytes for tensor in self._tensors])
        self._memory = HostBlock(size, device)
        self.host = self._memory.memory
        self._on_host = self._views(self.host)
        self._in_buffer: list[Tensor] = []
        for tensor, view in zip(self._tensors, self._on_host, strict=True):
            view.copy_(tensor)
            tensor.data = view

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(self._offsets, self._tensors, strict=True)
        ]

    def take_buffer(self, memory: Tensor) -> None:
        """From now on `enter_buffer` points into this memory."""
        self._in_buffer = self._views(memory)

    def enter_buffer(self) -> None:
        """Let the block's tensors be those in its buffer.

        Raises:
            RuntimeError: a tensor was replaced by another one, which would be lost.
        """
        self._point_to(self._in_buffer)

    def leave_buffer(self) -> None:
        """Let the block's tensors be those in host memory.

        Raises:
            RuntimeError: a tensor was replaced by another one, which would be lost.
        """
        self._point_to(self._on_host)

    def drop_buffer(self) -> None:
        """Leave the buffer, and forget it."""
        self.leave_buffer()
        self._in_buffer = []

    def _point_to(self, views: list[Tensor]) -> None:
        for tensor, view, *own in zip(
            self._tensors, views, self._on_host, self._in_buffer or self._on_host, strict=True
        ):
            if tensor.data_ptr() not in [each.data_ptr() for each in own]:
                raise RuntimeError(
                    "a weight whose place is in host memory was replaced (was an adapter merged "
                    "into it?), and the change would be lost when the layer computes: load the "
                    "model with base_weights='gpu' to merge or to edit it."
                )
            tensor.data = view


class _BeforeForward:
    def __init__(self, weights: HostWeights, index: int) -> None:
        self._weights, self._index = weights, index

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self._weights.before_forward(self._index)


class _AfterForward:
    def __init__(self, weights: HostWeights, index: int) -> None:
        self._weights, self._index = weights, index

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor) and part.grad_fn is not None:
                part.grad_fn.register_prehook(self._before_backward)

    def _before_backward(self, gradients: Any) -> None:
        self._weights.before_backward(self._index)


_of_models: weakref.WeakKeyDictionary[nn.Module, HostWeights] = weakref.WeakKeyDictionary()


def weights_to_host(model: nn.Module, device: torch.device) -> HostWeights:
    """Serve the decoder layers' matrices from host memory, in place; twice does no harm.

    Everything else, adapters among it, is moved to the device. Of matrices that several layers
    share nothing is moved to the host.

    Args:
        model: a causal LM or a PeftModel on it, on whatever device, dense or 4-bit.
        device: where it will compute.

    Raises:
        ValueError: the model's layers are not known one by one.
        MemoryError: the host cannot pin so much memory.
    """
    causal_lm = unwrap_model(model)
    if not supports_checkpointing(causal_lm):
        raise ValueError(
            f"the decoder layers of {type(causal_lm).__name__} are not known one by one, so its "
            "base cannot come from host memory layer by layer: leave out --base_weights."
        )
    if causal_lm not in _of_models:
        weights = HostWeights(decoder_layers(causal_lm), device)
        _of_models[causal_lm] = weights
        logger.info(
            "%.2f GiB of the base lie in host memory and come to the device layer by layer.",
            weights.host_bytes / 2**30,
        )
    move_resident(model)
    return _of_models[causal_lm]


def host_weights(model: nn.Module) -> HostWeights | None:
    """The weights of a model that lie in host memory, or None where all lie on its device."""
    return _of_models.get(unwrap_model(model))


def move_resident(model: nn.Module) -> None:
    """Move all but the weights in host memory to where the model computes.

    PEFT makes an adapter where its layer's weight is; so this is called after one was added.
    Models without weights in host memory are left as they are.
    """
    weights = host_weights(model)
    if weights is not None:
        nn.Module.to(model, weights.device)
        causal_lm: Any = unwrap_model(model)
        if hasattr(causal_lm, "hf_device_map"):
            causal_lm.hf_device_map = {"": weights.device}


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters` with the weights in host memory, by the names of the state dict."""
    yield from module.named_parameters()
    for path, part in module.named_modules():
        for name in vars(part).get(_NAMES, ()):
            yield f"{path}.{name}" if path else name, getattr(part, name)


def entries_on_host(model: nn.Module) -> int:
    """Entries of all matrices in host memory, of 4-bit ones those that they stand for."""
    resident = {id(each) for each in model.parameters()}
    on_host = [each for _, each in named_weights(model) if id(each) not in resident]
    shapes = [getattr(getattr(each, "quant_state", each), "shape", each.shape) for each in on_host]
    return sum(math.prod(shape) for shape in shapes)


def writable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `named_weights` by name; what is written to them now is what computes later.

    The buffers of weights in host memory are freed, whose contents are copies.
    """
    if (weights := host_weights(model)) is not None:
        weights.release()
    return dict(named_weights(model))


_NAMES = "_names_on_host"
"""Attribute of a module: the names of its weights that lie in host memory."""


def _unregister(module: nn.Module, name: str, weight: Tensor) -> None:
    """Keep a weight as a plain attribute, and in the state dict."""
    del module._parameters[name]
    object.__setattr__(module, name, weight)
    if _NAMES not in vars(module):
        object.__setattr__(module, _NAMES, [])
        module.register_state_dict_post_hook(_add_to_state_dict)
    vars(module)[_NAMES].append(name)


def _add_to_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in vars(module)[_NAMES]:
        state[f"{prefix}{name}"] = getattr(module, name).detach()


def _base_matrices(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The base's parameters of two dimensions or more, in the order of their modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # seconds, which the planner spares
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return  # trained as a whole
    if isinstance(module, BaseTunerLayer):
        yield from _base_matrices(module.get_base_layer())
        return
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.ndim >= 2:
            yield module, name, parameter
    for child in module.children():
        yield from _base_matrices(child)


def _own_matrices(
    layers: Sequence[nn.Module], shared: set[int]
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The base's matrices of some layers, without those that several layers have."""
    for layer in layers:
        yield from (each for each in _base_matrices(layer) if id(each[2]) not in shared)


def _in_several(layers: Sequence[nn.Module]) -> set[int]:
    """The ids of matrices that more than one layer has."""
    found = Counter(
        each for layer in layers for each in {id(weight) for *_, weight in _base_matrices(layer)}
    )
    return {each for each, count in found.items() if count > 1}


def _largest_layer(layers: Sequence[nn.Module], shared: set[int]) -> int:
    """Bytes that the largest layer's matrices take within a block."""
    return max(
        sum(
            aligned(part.nbytes)
            for *_, weight in _own_matrices([layer], shared)
            for part in _parts(weight)
        )
        for layer in layers
    )


def _parts(weight: Tensor) -> list[Tensor]:
    """A weight, and of a 4-bit one the scales that travel with it."""
    return [weight, *(state.absmax for state in _quant_states(weight))]


def _tables_to(weight: Tensor, device: torch.device) -> None:
    """Move the small tables of a 4-bit weight to the device, where they stay."""
    for state in _quant_states(weight):
        for name in ("code", "offset"):
            if isinstance(table := getattr(state, name, None), Tensor):
                setattr(state, name, table.to(device))


def _quant_states(weight: Any) -> Iterator[Any]:
    """The state of a 4-bit weight, and with double quantization that of its scales."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield state
        state = state.state2

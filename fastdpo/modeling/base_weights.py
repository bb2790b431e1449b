"""Frozen weights in host memory: a decoder layer's matrices are on the GPU while it computes.

LoRA never changes the base, so the base need not lie on the GPU. The matrices of layer i are copied
into buffer i mod S of S buffers, on a stream of their own beside the computation. With two buffers
and four layers, F being the forward of a layer, B its backward (its recomputation included) and c
the copy of its matrices:

    compute stream        F0    F1    F2    F3    B3    B2    B1    B0
    copy stream     c0    c1    c2    c3                c1    c0
    buffer 0        0     0     2     2     2     2     2     0     0
    buffer 1              1     1     3     3     3     1     1     1

A copy begins when the layer begins that follows the buffer's last user, so S buffers are filled
S - 1 layers ahead, and the last S layers of a forward need no copy for their backward, nor the
first S for the next forward. S buffers thus do what S resident layers would.

This is a property of the decoder layer: a hook before its forward asks for its matrices, which a
recomputation repeats, and one before the last node of its forward asks for them in the backward;
the autograd engine runs nodes in the reverse order of their making, so everything of the layer
above has run by then. Every activation plan works with it as it is. A layer has the same buffer
all the time: whatever autograd saved of its matrices, a transposed view for example, holds them
again when its backward begins.

The model's tensors stay the objects that they are. Each points to the layer's buffer as long as the
buffer holds the layer, and else to host memory; so whoever reads them, at any time and after any
failure, reads the weights.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastdpo.modeling.activations import decoder_layers
from fastdpo.modeling.head import unwrap_model

LEAST_BUFFERS = 2
"""One holds the layer that computes, one takes the next."""

ALIGNMENT = 256
"""Bytes to whose multiples a tensor begins within a block: what GPU kernels read fastest."""

PAGE = 4096

FORWARD, BACKWARD = 1, -1


class HostWeights:
    """The matrices of a model's decoder layers in host memory, and their buffers on the device.

    Args:
        layers: decoder layers in order. Their matrices become frozen and are no parameters any more
            (they say nothing about where the model computes, and `.to(device)` must not move them),
            but keep their names, and their places in the state dict.
        device: where the layers compute.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self.layers: list[_LayerWeights] = []
        self._copies = _Copies(device)
        self._buffers: list[_Buffer] = []
        self._last = (-1, FORWARD)
        shared = _in_several(layers)
        for index, layer in enumerate(layers):
            self.layers.append(_LayerWeights(layer, device, shared))
            layer.register_forward_pre_hook(_BeforeForward(self, index))
            layer.register_forward_hook(_AfterForward(self, index))

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(layer.block.nbytes for layer in self.layers)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def use_buffers(self, count: int) -> None:
        """Take so many buffers, at least two and at most one a layer; the former ones are freed."""
        count = min(max(count, LEAST_BUFFERS), len(self.layers))
        if count == len(self._buffers):
            return
        self.release()
        with torch.inference_mode(False):
            for first in range(count):
                those = self.layers[first::count]
                size = max(layer.block.nbytes for layer in those)
                memory = torch.empty(size, dtype=torch.uint8, device=self.device)
                self._buffers.append(_Buffer(memory))
                for layer in those:
                    layer.take_buffer(memory)

    def release(self) -> None:
        """Free the buffers; the next layer that computes takes two."""
        for layer in self.layers:
            layer.leave_buffer()
        self._copies.finish()
        self._buffers, self._last = [], (-1, FORWARD)

    def before_forward(self, layer: int) -> None:
        """Have a layer's matrices on the device for its forward, or for its recomputation."""
        if self._last != (layer, BACKWARD):
            self._use(layer, FORWARD)

    def before_backward(self, layer: int) -> None:
        """Have a layer's matrices on the device for its recomputation and backward."""
        self._use(layer, BACKWARD)

    def _use(self, layer: int, direction: int) -> None:
        if not self._buffers:
            self.use_buffers(LEAST_BUFFERS)
        self._last = layer, direction
        buffer = self._buffer_of(layer)
        if buffer.layer != layer:
            self._fetch(layer)
        if not buffer.is_in_use:
            self._copies.wait(buffer.copied)
            self.layers[layer].enter_buffer()
            buffer.is_in_use = True
        wanted = {id(buffer)}
        for following in self._following(layer, direction):
            buffer = self._buffer_of(following)
            if id(buffer) in wanted:
                break  # of a layer that comes before it
            wanted.add(id(buffer))
            if buffer.layer != following:
                self._fetch(following)

    def _following(self, layer: int, direction: int) -> Iterator[int]:
        """The layers that come next, one for each further buffer.

        In passes without gradients the first ones come again after the last. (A backward has
        gradients turned off too.)
        """
        count = len(self.layers)
        for distance in range(1, len(self._buffers)):
            following = layer + direction * distance
            if 0 <= following < count:
                yield following
            elif direction == FORWARD and not torch.is_grad_enabled():
                yield following % count
            else:
                break

    def _buffer_of(self, layer: int) -> "_Buffer":
        return self._buffers[layer % len(self._buffers)]

    def _fetch(self, layer: int) -> None:
        """Begin the copy of a layer's matrices into its buffer, whoever's they are now."""
        buffer = self._buffer_of(layer)
        buffer.is_in_use = False
        if buffer.layer is not None:
            self.layers[buffer.layer].leave_buffer()
        buffer.layer = None  # until the copy has begun: it may fail
        buffer.copied = self._copies.start(buffer.memory, self.layers[layer].block)
        buffer.layer = layer


class _Buffer:
    """Memory of one layer on the device."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.layer: int | None = None  # whose matrices it holds, or is being given
        self.copied: Any = None  # the CUDA event after that copy
        self.is_in_use = False  # whether that layer's tensors point to it


class _LayerWeights:
    """One decoder layer's matrices in one block of host memory."""

    def __init__(self, layer: nn.Module, device: torch.device, shared: set[int]) -> None:
        self._tensors: list[Tensor] = []
        for module, name, weight in _base_matrices(layer):
            if id(weight) not in shared:
                self._tensors += [weight, *_packed_scales(weight, device)]
                _unregister(module, name, weight.requires_grad_(False))
        self._offsets: list[int] = []
        end = 0
        for tensor in self._tensors:
            self._offsets.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.block = _host_block(end, device)
        self._on_host = self._views(self.block)
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
        """Let the layer's tensors be those in its buffer."""
        for tensor, view in zip(self._tensors, self._in_buffer, strict=True):
            tensor.data = view

    def leave_buffer(self) -> None:
        """Let the layer's tensors be those in host memory."""
        for tensor, view in zip(self._tensors, self._on_host, strict=True):
            tensor.data = view


class _Copies:
    """Copies from host memory to the device: beside the computation on CUDA, else at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Copy to the beginning of the target once all that is queued has run; its end's event."""
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.no_grad(), torch.cuda.stream(stream):
            target[: source.nbytes].copy_(source, non_blocking=True)
        return None if stream is None else stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let what is computed next wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)

    def finish(self) -> None:
        """Let what is computed next wait for all copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


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
    if causal_lm not in _of_models:
        _of_models[causal_lm] = HostWeights(decoder_layers(causal_lm), device)
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


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters` with the weights in host memory, by the names of the state dict."""
    yield from model.named_parameters()
    if host_weights(model) is None:
        return
    for path, module in model.named_modules():
        for name in vars(module).get(_NAMES, ()):
            yield f"{path}.{name}", getattr(module, name)


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


def _in_several(layers: Sequence[nn.Module]) -> set[int]:
    """The ids of matrices that more than one layer has."""
    found = Counter(
        each for layer in layers for each in {id(weight) for *_, weight in _base_matrices(layer)}
    )
    return {each for each, count in found.items() if count > 1}


def _packed_scales(weight: Any, device: torch.device) -> list[Tensor]:
    """The scales of a 4-bit weight, which travel with it; its small tables go to the device."""
    scales = []
    state = getattr(weight, "quant_state", None)
    while state is not None:  # with double quantization the scales have a state of their own
        scales.append(state.absmax)
        for name in ("code", "offset"):
            if isinstance(table := getattr(state, name, None), Tensor):
                setattr(state, name, table.to(device))
        state = state.state2
    return scales


def _host_block(size: int, device: torch.device) -> Tensor:
    """Uninitialized memory of the host, (size,) uint8, pinned in place where the device is CUDA.

    torch's own pinned memory is taken in powers of two, which would waste a seventh of an 8B.

    Raises:
        MemoryError: it cannot be pinned.
    """
    if device.type != "cuda" or not size:
        return torch.empty(size, dtype=torch.uint8)
    pages = -(-size // PAGE) * PAGE
    memory = torch.empty(pages + PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % PAGE
    cudart: Any = torch.cuda.cudart()
    if code := int(cudart.cudaHostRegister(memory.data_ptr() + begin, pages, 0)):
        raise MemoryError(
            f"the host cannot pin {pages:,} bytes for one layer's weights (CUDA error {code}): "
            "free host memory, raise `ulimit -l`, or leave the base on the GPU (--qlora takes a "
            "quarter of the memory)."
        )
    end: Any = weakref.finalize(
        memory.untyped_storage(), cudart.cudaHostUnregister, memory.data_ptr() + begin
    )
    end.atexit = False  # the driver may be gone by then
    return memory[begin : begin + size]

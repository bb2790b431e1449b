"""Bytes that the tokens of a micro-batch take: what a layer saves, and what its backward adds.

Counted along the autograd graph as transformers and `lora_linear` build it: a norm saves its input
in fp32 and one number a token, `lora_linear` its input (which layers that read the same tensor
share), attention its queries, keys, values, output and one number a head, SiLU and product the
three tensors that they read. Fused, a norm saves its input as it is, and the MLP gate and up, in
whose place its gradients are written; where all weights are trained, also what the layer down
reads. `tests/planner/test_terms.py` counts the same on real models, to the
byte.
"""

from dataclasses import dataclass

from fastdpo.modeling.attention_backends import BACKENDS
from fastdpo.planner.architecture import Architecture
from fastdpo.planner.states import StateLayers
from fastdpo.planner.terms import Training, dequantized_bytes, runs_fused

OFFLOADED_ON_GPU = 2
"""Inputs of offloaded layers that lie on the GPU at a time: one in use, one on its way."""

NORM_TEMPORARIES = 5
"""Tensors of (T, H) in fp32 that the backward of a norm holds besides what was saved."""


@dataclass(frozen=True)
class MicroBatchShape:
    """How many tokens of which kind one micro-batch has.

    Attributes:
        tokens: T.
        scored_tokens: N.
        repeated_tokens: prefix tokens that lie among the keys once more, for the completions after
            the first.
        further_tokens: tokens of the completions after the first.
        mask_entries: queries times keys of those completions: entries of the masks that attention
            segment by segment ("sdpa") saves.
        prefixes: sequences that layers with a state start.
        suffixes: sequences that they go on with.
    """

    tokens: int
    scored_tokens: int
    repeated_tokens: int = 0
    further_tokens: int = 0
    mask_entries: int = 0
    prefixes: int = 0
    suffixes: int = 0


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one decoder layer takes for a micro-batch.

    Attributes:
        input: its input, which is all that a recomputed one saves.
        attention: saved from its input to the residual sum in the middle.
        attention_results: what the attention kernel returns, within `attention`: all that a layer
            that keeps its attention saves besides its input.
        middle_norm: saved by the norm before the MLP, less its output.
        mlp: saved by the MLP, the output of that norm included.
        backward: what its backward adds to all that in the phase in which it needs most.
        dequantized: the dense copy of a weight within `backward`.
        dense_weights: dense copies of all its 4-bit weights but that of its last linear layer,
            which is not recomputed: what waits for the backward where they are made once.
        first_spared: what the very first layer saves less, where its input needs no gradient.
        holds_input: whether `attention` counts the input itself.
    """

    input: int
    attention: int
    attention_results: int
    middle_norm: int
    mlp: int
    backward: int
    dequantized: int
    dense_weights: int
    first_spared: int
    holds_input: bool

    @property
    def kept(self) -> int:
        """Bytes that a kept layer saves."""
        return self.attention + self.middle_norm + self.mlp


def layer_bytes(
    architecture: Architecture,
    training: Training,
    shape: MicroBatchShape,
    *,
    mlp_tile_tokens: int | None = None,
    norm_tile_tokens: int | None = None,
) -> LayerBytes:
    """Bytes that one decoder layer takes for a micro-batch.

    Args:
        architecture: of the model.
        training: what is trained.
        shape: tokens of the micro-batch.
        mlp_tile_tokens: tokens of a tile of the MLPs; None runs them over all tokens at once.
        norm_tile_tokens: likewise of the norms.
    """
    d, tokens = training.entry_bytes, shape.tokens
    stream = d if training.trains_adapter else 4
    hidden = architecture.hidden * tokens
    # Under autocast every linear layer casts and saves its own copy of what it reads.
    readers, mlp_readers = (1, 1) if training.trains_adapter else (3, 2)
    fused = runs_fused(architecture, training)
    norms = _Norms(training, tokens, norm_tile_tokens, fused)
    norm = norms.saved(architecture.hidden)
    outer = architecture.norms - 2  # those after attention and MLP, which no linear layer reads
    attention = norm + readers * d * hidden + _attention(architecture, training, shape)
    attention += (outer - outer // 2) * norm
    if architecture.query_key_norms:
        queries, keys = architecture.query_width, architecture.key_width
        attention += norms.saved(queries, architecture.head_size)
        attention += norms.saved(keys, architecture.head_size)
    if architecture.states is not None:  # layers of either kind count as the larger
        states = norm + readers * d * hidden + _states(architecture.states, training, shape)
        attention = max(attention, states + (outer - outer // 2) * norm)
    tile = tokens if mlp_tile_tokens is None else min(mlp_tile_tokens, tokens)
    per_token = d * architecture.intermediate
    inner = (4 if not fused else 2 if training.trains_adapter else 3) * per_token * tile
    mlp = mlp_readers * d * hidden + outer // 2 * norm + (inner if tile == tokens else 0)
    saved = attention + norm + mlp
    scratch = max(
        (dequantized_bytes(linear, training) for linear in architecture.linears), default=0
    )
    # The gradients of the product, and of its two factors or the dense weight.
    inside = per_token * tile + max(0 if fused else per_token * tile, scratch)
    if tile < tokens:  # the tile is run forward again, and the input's gradient is there for all
        inside += inner + d * hidden
    gradient = stream * hidden
    phases = {
        "mlp": saved + gradient + inside,
        "middle norm": attention + norm + gradient + norms.backward(architecture.hidden),
        "attention": attention + gradient + _attention_backward(architecture, training, shape),
    }
    if outer:
        phases["last norm"] = saved + gradient + norms.backward(architecture.hidden)
    if architecture.query_key_norms:
        phases["query norm"] = attention + gradient + norms.backward(architecture.query_width)
    return LayerBytes(
        input=stream * hidden,
        attention=attention,
        attention_results=_attention_results(architecture, training, shape),
        middle_norm=norm,
        mlp=mlp,
        backward=max(phases.values()) - saved,
        dequantized=scratch,
        dense_weights=_dense_weights(architecture, training),
        first_spared=norm if training.trains_adapter else 0,
        holds_input=norms.keep_input,
    )


def _dense_weights(architecture: Architecture, training: Training) -> int:
    """Bytes of one layer's weights in the compute dtype, less those of the MLP's last."""
    if training.tuning != "qlora":
        return 0
    last = architecture.intermediate * architecture.hidden
    each = architecture.linear_parameters // architecture.layers
    return training.entry_bytes * (each - last)


@dataclass(frozen=True)
class _Norms:
    """How norms run: over all tokens at once in fp32, or tile by tile; or fused, token by token."""

    training: Training
    tokens: int
    tile_tokens: int | None
    fused: bool

    @property
    def tiled(self) -> bool:
        return not self.fused and self.tile_tokens is not None and self.tile_tokens < self.tokens

    @property
    def stream_bytes(self) -> int:
        return self.training.entry_bytes if self.training.trains_adapter else 4

    @property
    def keep_input(self) -> bool:
        """Tells whether norms save the input itself, not a copy of it."""
        return self.fused or self.tiled or self.stream_bytes == 4

    def saved(self, width: int, size: int | None = None) -> int:
        """Bytes saved: the input in fp32 and a number for each vector of `size`.

        Tiled it is the input as it is, and fused too, with the number for each vector. A trained
        weight needs what it multiplies too, unless fused.
        """
        entries = width * self.tokens
        if self.fused:
            return self.stream_bytes * entries + 4 * (entries // (size or width))
        if self.tiled:
            return self.stream_bytes * entries
        normed = 0 if self.training.trains_adapter else 4 * entries
        return 4 * entries + 4 * (entries // (size or width)) + normed

    def backward(self, width: int) -> int:
        """Bytes that the backward adds: fp32 tensors of all tokens, or of a tile.

        Tiled, the gradient of all tokens comes on top; fused it is all there is.
        """
        if self.fused:
            return self.stream_bytes * width * self.tokens
        if not self.tiled:
            return NORM_TEMPORARIES * 4 * width * self.tokens
        assert self.tile_tokens is not None, "tiled"
        of_tile = (NORM_TEMPORARIES + 2) * 4 * width * self.tile_tokens
        return self.stream_bytes * width * self.tokens + of_tile


def _attention(architecture: Architecture, training: Training, shape: MicroBatchShape) -> int:
    """Bytes saved between the first norm and the residual sum, inputs of linear layers left out."""
    d = training.entry_bytes
    queries, keys = architecture.query_width, architecture.key_width
    saved = d * queries * shape.tokens + _attention_results(architecture, training, shape)
    backend = BACKENDS[training.attention]
    gathered = shape.repeated_tokens if backend.gathers_keys else 0
    saved += 2 * d * keys * (shape.tokens + gathered)
    if backend.copies_output:
        saved += d * queries * shape.tokens
    if backend.keeps_masks:
        saved += (
            2 * d * keys * (shape.repeated_tokens + shape.further_tokens) + d * shape.mask_entries
        )
    return saved


def _states(layers: StateLayers, training: Training, shape: MicroBatchShape) -> int:
    """Bytes that a layer with a state saves, the input of its first linear layers left out."""
    d = training.entry_bytes
    saved = layers.saved_bytes(d, shape.tokens, shape.prefixes, shape.suffixes)
    return saved + d * layers.outputs * shape.tokens


def _attention_results(
    architecture: Architecture, training: Training, shape: MicroBatchShape
) -> int:
    """Bytes of the attention's output, which o_proj reads, and of the softmax's sums in fp32."""
    entries = training.entry_bytes * architecture.query_width + 4 * architecture.query_heads
    return entries * shape.tokens


def _attention_backward(
    architecture: Architecture, training: Training, shape: MicroBatchShape
) -> int:
    """Bytes of the gradients of output, queries, keys and values, and of a flash kernel's backward.

    The latter is the sum of the queries' gradient in fp32 and, where heads share keys and values,
    their gradients for every query head.
    """
    d, queries, keys = training.entry_bytes, architecture.query_width, architecture.key_width
    gathered = shape.tokens + shape.repeated_tokens
    gradients = 2 * d * queries * shape.tokens + 2 * d * keys * gathered
    if not BACKENDS[training.attention].flash_backward:
        return gradients
    shared = 2 * d * queries * gathered if queries != keys else 0
    return gradients + 4 * queries * shape.tokens + shared


def head_bytes(
    architecture: Architecture,
    training: Training,
    shape: MicroBatchShape,
    norm_tile_tokens: int | None = None,
) -> int:
    """Bytes of the last norm and the head, in forward or backward, whichever takes more.

    Forward: the norm's input and output, the scored states, U in their place, and the kernel's
    buffers. A trained head sums its gradient in fp32 and casts it twice, (V, H) each.
    """
    d, hidden = training.entry_bytes, architecture.hidden
    norms = _Norms(training, shape.tokens, norm_tile_tokens, runs_fused(architecture, training))
    norm, scored = norms.saved(hidden), hidden * shape.scored_tokens
    forward = norm + d * hidden * shape.tokens + 2 * d * scored
    forward += _head_buffers(architecture, training, shape)
    backward = norm + (d + 8) * scored
    last_norm = norm + norms.backward(hidden)
    if not training.trains_adapter:
        backward += 6 * architecture.vocabulary * hidden
    return max(forward, backward, last_norm)


def _head_buffers(architecture: Architecture, training: Training, shape: MicroBatchShape) -> int:
    """Bytes of the buffers of `linear_logprobs`: their bound, or less where all states need less.

    They need the exponentials in d, and two fp32 numbers a tile of 128 columns, whose place the
    fp32 product takes.
    """
    scratch = max(architecture.vocabulary / 16, 4 * architecture.hidden)
    wanted = shape.scored_tokens * (architecture.vocabulary * training.entry_bytes + scratch)
    return min(training.head_buffer_bytes, int(wanted))


def table_bytes(architecture: Architecture, training: Training, shape: MicroBatchShape) -> int:
    """Bytes of rotary tables, token ids, positions, scored positions, targets and masks."""
    rotary = 2 * training.entry_bytes * architecture.head_size * shape.tokens
    masks = shape.mask_entries if BACKENDS[training.attention].keeps_masks else 0
    return rotary + masks + 8 * (2 * shape.tokens + 4 * shape.scored_tokens)


def scoring_bytes(architecture: Architecture, training: Training, shape: MicroBatchShape) -> int:
    """Bytes of a pass without gradients, the reference's, which needs most inside an MLP."""
    d = training.entry_bytes
    widest = (2 * architecture.hidden + 3 * architecture.intermediate) * shape.tokens * d
    scratch = max(
        (dequantized_bytes(linear, training) for linear in architecture.linears), default=0
    )
    return widest + scratch + _head_buffers(architecture, training, shape)

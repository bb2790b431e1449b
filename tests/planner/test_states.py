"""What layers with a state save, counted on the meta device, against what they really save."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from fastdpo.batching import Segment
from fastdpo.modeling import state_forks
from fastdpo.modeling.attention import PackedSegments
from fastdpo.modeling.head import get_backbone
from fastdpo.modeling.sequences import CHUNK
from fastdpo.modeling.state_forks import fork_states, state_layers
from fastdpo.planner import Training, architecture_named, architecture_of
from fastdpo.planner.activations import MicroBatchShape, layer_bytes
from fastdpo.planner.speed import update_flops
from fastdpo.planner.states import DTYPES, count_states
from tests.modeling.test_packed_pairs import SIZES
from tests.modeling.test_state_forks import FORKED, forking_model


def counted(model):
    return count_states(get_backbone(model), model.config.get_text_config())


def really_saved(layer, segments, hidden, dtype):
    held = {}
    weights = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), *layer.buffers()]}

    def keep(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            held.setdefault(place, tensor)
        return tensor

    tokens = sum(segment.tokens for segment in segments)
    inputs = torch.randn(1, tokens, hidden, dtype=dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(inputs * 1, packed=PackedSegments(segments))
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("entry_bytes", DTYPES)
@pytest.mark.parametrize("family", ["lfm2", "qwen3.5", "olmo-hybrid", "granite-hybrid"])
def test_bytes_of_whole_chunks_are_those_really_saved(family, entry_bytes):
    """To the byte of convolutions, to a percent of what torch's forms save besides."""
    model = forking_model(family).to(DTYPES[entry_bytes]).requires_grad_(requires_grad=False)
    backbone, long = get_backbone(model), 4 * CHUNK
    fork_states(backbone)
    segments = (Segment(0, long, (long, long)), Segment(3 * long, long, (long,)))
    (layer, *_) = state_layers(backbone)
    found = really_saved(layer, segments, model.config.hidden_size, DTYPES[entry_bytes])
    each = counted(model).saved[entry_bytes]
    predicted = 5 * long * each.token + 2 * each.start + 3 * each.suffix
    assert predicted == pytest.approx(found, rel=0 if family == "lfm2" else 0.01)


def test_a_kernel_saves_a_state_for_each_suffix_and_less_of_everything(monkeypatch):
    torch_form = counted(forking_model("qwen3.5"))
    monkeypatch.setattr(state_forks, "runs_kernel", lambda package, *_: package == "fla")
    kernel = counted(forking_model("qwen3.5"))
    config = FORKED["qwen3.5"]
    heads, keys = config.linear_num_value_heads, config.linear_key_head_dim
    state = heads * keys * config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * keys + heads * config.linear_value_head_dim
    past = config.linear_conv_kernel_dim - 1
    for entry_bytes, saved in kernel.saved.items():
        # Of the past what the convolution reads and what its activation reads; places of all that.
        convolved, places = 2 * entry_bytes * past * channels, 8 * past + 8 + 2 * 4
        assert saved.suffix == 4 * state + convolved + places
        assert saved.token < torch_form.saved[entry_bytes].token / 2


def test_plans_count_them():
    """The largest kind of layer is what a layer takes; only attention grows with the square."""
    hybrid = architecture_of(forking_model("qwen3.5"), "tiny")
    plain = architecture_of(AutoModelForCausalLM.from_config(Qwen3Config(**SIZES)), "tiny")
    assert plain.states is None
    assert hybrid.states.count == 1
    training = Training("lora", 2, attention="sdpa", kernels="eager")
    shapes = [MicroBatchShape(512, 100, prefixes=n, suffixes=2 * n) for n in (0, 1, 3)]
    none, one, three = (layer_bytes(hybrid, training, shape).attention for shape in shapes)
    each = hybrid.states.saved[2]
    of_a_pair = each.start + 2 * each.suffix + 3 * CHUNK // 2 * each.token
    assert (one - none, three - one) == (of_a_pair, 2 * of_a_pair)
    assert none >= 512 * each.token
    assert layer_bytes(plain, training, shapes[0]) == layer_bytes(plain, training, shapes[2])

    def flops(architecture, tokens):
        shape = MicroBatchShape(tokens, 1)
        return update_flops(
            architecture, training, shape, kept_layers=0, kept_attentions=0, tiled=False,
            group_tokens=tokens,
        )  # fmt: skip

    square = flops(hybrid, 1024) - 2 * flops(hybrid, 512)
    head = 2 * hybrid.hidden * hybrid.vocabulary * 2
    assert square + head == 4 * hybrid.query_width * (512 * 1024 - 2 * 256 * 512) * 4.5


def test_a_real_shape_is_counted_offline():
    found = architecture_named("qwen3.5-9b").states
    assert found.count == 24
    assert found.saved[2].token * CHUNK > 4 * 32 * 128 * 128, "torch keeps the state of each chunk"

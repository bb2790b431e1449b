"""States of linear attention forked by flash-linear-attention's kernels on a CUDA device."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastdpo.batching import pack_update
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.head import get_backbone
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.state_forks import states_kind
from tests.modeling.test_packed_pairs import random_groups
from tests.modeling.test_state_forks import of_lengths

pytestmark = pytest.mark.gpu

SIZES = {
    "vocab_size": 288, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 0,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "max_position_embeddings": 1024,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip


def run(model, groups, **layout):
    """Log-probs, and the gradient of every parameter in fp64, in one vector."""
    model.zero_grad()
    (micro_batch,) = pack_update(groups, 4096, **layout)
    with packed_attention(model.config):
        logps = packed_logprobs(model, micro_batch.to("cuda")).logps
    logps.view(-1, 2).diff().sum().backward()
    gradients = [parameter.grad.double().flatten().cpu() for parameter in model.parameters()]
    return logps.detach().cpu(), torch.cat(gradients)


def test_forked_by_the_kernels_as_near_the_truth_as_each_sequence_alone():
    """In bf16, beside the torch form in fp32: as near as the kernels are with nothing forked."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_5_text"](**SIZES)).cuda()
    groups = [*random_groups(7), of_lengths(200, 90, 150), of_lengths(3, 70, 1)]
    backbone = get_backbone(model)
    assert states_kind(backbone, model.device, torch.float32) == "torch"
    assert states_kind(backbone, model.device, torch.bfloat16) == "fla"
    truth = run(model, groups)
    half = copy.deepcopy(model).bfloat16()
    shared, alone = run(half, groups), run(half, groups, shared_prefix=False)
    for name, wanted, found, usual in zip(
        ("log-probs", "gradients"), truth, shared, alone, strict=True
    ):
        size = wanted.norm()
        error, apart = (found - wanted).norm() / size, (usual - wanted).norm() / size
        assert error <= 0.1, f"{name} are {error:.1e} off"
        assert error <= 2 * apart + 1e-3, f"{name}: {error:.1e} with a fork, {apart:.1e} without"

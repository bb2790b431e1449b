"""With its dropout off no family draws a random number in training, however it holds its rates."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    CodeGenConfig,
    CTRLConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoXConfig,
    MptConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PersimmonConfig,
    PhiConfig,
    PhimoeConfig,
    PreTrainedConfig,
    StableLmConfig,
    Starcoder2Config,
    XGLMConfig,
)

from fastdpo.batching import pack_update
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.dropout import configured_dropout, disable_dropout
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.packing import choose_packing
from tests.modeling.test_families import UNPACKED
from tests.modeling.test_packed_pairs import FAMILIES, SIZES, random_groups
from tests.modeling.test_state_forks import FORKED
from tests.tiny_trainer import tiny_base, tiny_trainer

GPT = {"vocab_size": 131, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAIRSEQ = {"vocab_size": 131, "ffn_dim": 48, "max_position_embeddings": 128, "pad_token_id": 0}
OTHERS = {
    "gpt2": GPT2Config(**GPT),
    "gpt-bigcode": GPTBigCodeConfig(**GPT),
    "gptj": GPTJConfig(**GPT, rotary_dim=4),
    "codegen": CodeGenConfig(**GPT, rotary_dim=4),
    "openai-gpt": OpenAIGPTConfig(**GPT),
    "ctrl": CTRLConfig(**GPT, dff=48),
    "opt": OPTConfig(
        **FAIRSEQ, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2,
        num_attention_heads=4, layerdrop=0.3,
    ),
    "xglm": XGLMConfig(**FAIRSEQ, d_model=32, num_layers=2, attention_heads=4, layerdrop=0.3),
    "biogpt": BioGptConfig(**SIZES, layerdrop=0.3),
    "mpt": MptConfig(vocab_size=131, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "phi": PhiConfig(**SIZES),
    "phimoe": PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "persimmon": PersimmonConfig(**SIZES),
    "stablelm": StableLmConfig(**SIZES),
    "starcoder2": Starcoder2Config(**SIZES),
}  # fmt: skip
ALL = FAMILIES | FORKED | UNPACKED | OTHERS


def set_rates(config, value=0.3):
    """Every rate in the config, nested ones too; returns their names."""
    found = []
    for name, each in list(vars(config).items()):
        if isinstance(each, PreTrainedConfig):
            found += set_rates(each, value)
        elif isinstance(each, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, value)
            found.append(name)
    return found


def with_rates(family):
    config = copy.deepcopy(ALL[family])
    rates = set_rates(config)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config), rates


def logps(model, groups):
    """Of all completions; and whether random numbers were drawn."""
    mode = choose_packing(model)
    (micro_batch,) = pack_update(
        groups, 4096, packing=mode.packing, shared_prefix=mode.shared_prefix
    )
    state = torch.get_rng_state()
    with torch.no_grad(), packed_attention(model.config, mode.attention):
        found = packed_logprobs(model, micro_batch).logps
    return found, not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("family", ALL)
def test_nothing_is_random_and_training_is_as_evaluation(family):
    model, _ = with_rates(family)
    groups = random_groups(2)
    truth, _ = logps(model.eval(), groups)
    before = model.config.to_dict()
    disable_dropout(model.train())
    found, drawn = logps(model, groups)
    assert not drawn
    assert torch.equal(found, truth)
    with configured_dropout(model):
        assert model.config.to_dict() == before, "what is saved has the rates that it came with"
    assert not logps(model.train(), groups)[1], "train() was called again"


@pytest.mark.parametrize("family", ["persimmon", "bloom", "starcoder2", "phimoe", "xglm"])
def test_the_rates_are_there_before(family):
    model, rates = with_rates(family)
    assert rates
    if family != "xglm":  # which skips whole layers
        assert logps(model.train(), random_groups(2))[1]


def test_adapters_keep_theirs():
    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.25, task_type="CAUSAL_LM")
    llama = get_peft_model(tiny_base(), config)
    disable_dropout(llama)
    rates = {m.p for m in llama.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


@pytest.mark.parametrize("family", ["opt", "persimmon", "starcoder2"])
def test_the_first_margin_is_zero(tmp_path, family):
    config = copy.deepcopy(ALL[family])
    config.vocab_size, config.max_position_embeddings = 288, 256
    set_rates(config)
    trainer = tiny_trainer(
        tiny_base(config), tmp_path, tuning="full", max_steps=1, ref_cache=str(tmp_path / "refs")
    )
    trainer.train()
    assert abs(trainer.first_update_margin) < 1e-4
    trainer.save_model()
    saved = type(config).from_pretrained(tmp_path)
    assert saved.attention_dropout == 0.3


def test_left_on_it_is_on_also_beside_a_frozen_adapter(tmp_path):
    config = copy.deepcopy(ALL["starcoder2"])
    config.vocab_size, config.max_position_embeddings = 288, 256
    set_rates(config)
    tiny_base(config).save_pretrained(tmp_path / "base")
    first = tiny_trainer(str(tmp_path / "base"), tmp_path / "a", max_steps=1, ref_cache="off")
    first.train()
    first.save_model()
    on = tiny_trainer(
        str(tmp_path / "a"), tmp_path / "b", tuning="full", disable_dropout=False,
        max_steps=1, ref_cache="off",
    )  # fmt: skip
    assert on.reference.reference.adapter is not None
    rates = {m.residual_dropout for m in on.policy.modules() if hasattr(m, "residual_dropout")}
    assert rates == {0.3}
    assert np.isfinite(on.train().training_loss)

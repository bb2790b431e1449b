"""A model's positions: where they end, what lies beyond is refused or warned of."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    CodeGenConfig,
    CTRLConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    XGLMConfig,
)

from fastdpo.batching import PromptGroup
from fastdpo.evaluation.evaluate_pairs import generate_completions
from fastdpo.modeling.positions import position_limit, require_positions, warn_of_positions
from fastdpo.modeling.scoring import score_pairs
from tests.tiny_trainer import ROWS, TOKENIZER, tiny_base, tiny_trainer

OLD = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 99}
NEW = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 32, "vocab_size": 99,
}  # fmt: skip
FEW = {name: NEW[name] for name in ("hidden_size", "max_position_embeddings", "vocab_size")}
HARD = {
    "gpt2": GPT2Config(**OLD),
    "openai-gpt": OpenAIGPTConfig(**OLD),
    "gpt-bigcode": GPTBigCodeConfig(**OLD),
    "gptj": GPTJConfig(**OLD, rotary_dim=8),
    "codegen": CodeGenConfig(**OLD | {"n_head": 4}, rotary_dim=4),
    "ctrl": CTRLConfig(**OLD, dff=48),
    "opt": OPTConfig(
        **FEW, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32
    ),
    "gpt-neo": GPTNeoConfig(**FEW, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]),
    "biogpt": BioGptConfig(**NEW),
    "mpt": MptConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=32, vocab_size=99),
}
SOFT = {
    "llama": LlamaConfig(**NEW),
    "phi": PhiConfig(**NEW),
    "gpt-neox": GPTNeoXConfig(**NEW),
    "gemma": GemmaConfig(**NEW, head_dim=16, num_key_value_heads=2),
    "falcon": FalconConfig(**FEW, num_hidden_layers=1, num_attention_heads=2),
}
ENDLESS = {
    "bloom": BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2),
    "falcon-alibi": FalconConfig(**FEW, num_hidden_layers=1, num_attention_heads=2, alibi=True),
    "mamba": MambaConfig(vocab_size=99, hidden_size=32, state_size=4, num_hidden_layers=1),
    "xglm": XGLMConfig(
        vocab_size=99, max_position_embeddings=32, d_model=32, ffn_dim=48, num_layers=1,
        attention_heads=2,
    ),
}  # fmt: skip


def runs(model, tokens):
    with torch.no_grad():
        model(input_ids=torch.arange(tokens)[None] % 90 + 3)


@pytest.mark.parametrize("family", [*HARD, *SOFT, *ENDLESS])
def test_the_limit_is_where_the_model_itself_stops(family):
    """The truth is transformers' own forward, on one token more than there are positions."""
    model = AutoModelForCausalLM.from_config((HARD | SOFT | ENDLESS)[family]).eval()
    runs(model, 32)
    limit = position_limit(model)
    if family in HARD:
        assert limit is not None
        assert (limit.tokens, limit.is_hard) == (32, True)
        with pytest.raises((IndexError, RuntimeError)):
            runs(model, 33)
        require_positions(model, 33)  # the last token is never an input
        with pytest.raises(ValueError, match=r"34 tokens, .* for 32: pass --max_length 32"):
            require_positions(model, 34)
    else:
        assert (limit is None) == (family in ENDLESS)
        runs(model, 44)
        require_positions(model, 45)


def test_untrained_positions_are_warned_of(caplog):
    model = AutoModelForCausalLM.from_config(SOFT["llama"])
    with caplog.at_level(logging.WARNING):
        warn_of_positions(model, 33)
        assert not caplog.messages
        warn_of_positions(model, 34)
    assert "has 34 tokens, and llama was made for 32" in caplog.text


def test_trainer_warns_and_scoring_and_generation_keep_within(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    rows = [dict(ROWS[0], prompt="day " * 80)]
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tiny_base(), tmp_path / "out", rows=rows)
    assert "was made for 256" in caplog.text
    model = AutoModelForCausalLM.from_config(GPT2Config(**OLD | {"vocab_size": 288}))
    ids = torch.arange(40, dtype=torch.int32).numpy()
    group = PromptGroup(ids[:20], (ids[20:], ids[20:30]))
    with pytest.raises(ValueError, match="--max_length 32"):
        score_pairs(model, [group])
    texts = generate_completions(model, TOKENIZER, [ids[:30], ids], max_new_tokens=8)
    assert texts[1] == ""

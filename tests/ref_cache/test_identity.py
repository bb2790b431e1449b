"""Every field of every configuration: what matters to a reference log-prob misses, the rest hits.

Each field of DPOConfig, LoraConfig and the model's config is given another value in turn. A field
that is on no list below must hit (or, for the model, miss), so a new one asks for a decision.
"""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Trainer

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data.chat_template import PLAIN_CHAT_TEMPLATE
from fastdpo.modeling import state_forks
from fastdpo.modeling.adapters import add_adapter
from fastdpo.modeling.attention import MODEL_ATTENTION
from fastdpo.ref_cache import reference_identity
from fastdpo.ref_cache.identity import IGNORED_CONFIG_KEYS
from fastdpo.ref_cache.store import group_keys
from tests.modeling.test_state_forks import forking_model
from tests.ref_cache.test_compute import SIZES, base
from tests.tiny_trainer import CONFIG, ROWS, TOKENIZER

PAIRS = ROWS[:5]

MISS = {
    "max_length": 40,
    "max_prompt_length": 4,
    "max_completion_length": 3,
    "truncation_mode": "keep_start",  # with a max_length that cuts
    "special_tokens_in_content": "literal",  # with rows that spell one
    "score_turns": "assistant",  # with completions of several turns
}
"""What shapes the rows."""

OTHER_VALUES = {
    "output_dir": "elsewhere",
    "report_to": "none",
    "eval_strategy": "steps",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "lr_scheduler_type": "cosine",
    "optim": "adafactor",
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "first_margin": "warn",
    "shared_prefix": "off",
    "micro_batch_tokens": 128,
    "ref_token_logps": "off",
    "ref_versions": "strict",
    "train_sampling_strategy": "sequential",
    "seed": 7,
    "data_seed": 3,
    "max_steps": 3,
    "run_name": "another",
    "num_train_epochs": 5.0,
    "loss_type": ["ipo"],
    "loss_weights": [0.5],
    "f_divergence_type": "js_divergence",
    "ld_alpha": 0.5,
    "discopop_tau": 0.1,
    "log_level": "info",
    "metric_for_best_model": "loss",
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "lr_scheduler_kwargs": {},
    "optim_args": None,
    "ref_cache": "another-folder",
    "base_weights": "host",
}

NEEDS = {
    "discopop_tau": {"loss_type": ["discopop"]},
    "simpo_gamma": {"loss_type": ["simpo", "hinge"]},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
}
"""Options that are refused where nothing reads them."""

NOT_FOR_A_TEST = {
    "use_cpu",  # another device: the same key, other versions
    "ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_timeout", "local_rank", "fsdp", "fsdp_config", "deepspeed",
    "parallelism_config", "accelerator_config", "half_precision_backend", "debug", "tf32",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo",
    "hub_always_push", "hub_revision", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "resume_from_checkpoint", "model_init_kwargs", "bf16", "fp16",
    "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end", "optim_target_modules",
    "dataloader_prefetch_factor", "project", "mp_parameters", "liger_kernel_config",
}  # fmt: skip
"""Several processes, the hub, or a GPU: refused, or looked at by other tests (bf16, fp16: 4)."""


def key_of(options, rows=PAIRS, model=None, peft_config=None):
    """What decides between hit and miss: the identity and the keys of the rows."""
    torch.manual_seed(0)
    arguments = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_config(CONFIG) if model is None else model,
        args=DPOConfig(**arguments),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if peft_config is None else None,
    )
    source = trainer.reference
    identity = reference_identity(source.reference.model, source.compute_dtype)
    return identity, {key for group in trainer.train_groups for key in group_keys(group)}


def other_value(entry):
    """Another value that the field may have; None if there is none that the test knows."""
    if entry.name in OTHER_VALUES:
        return OTHER_VALUES[entry.name]
    default = entry.default
    if default is dataclasses.MISSING and entry.default_factory is not dataclasses.MISSING:
        default = entry.default_factory()
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return type(default)(default + 1) if default > 0 or isinstance(default, int) else 0.5
    return None


def test_of_all_fields_of_dpo_config_only_those_that_shape_rows_miss(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    before = key_of({})
    tried, refused, untried = [], [], []
    for entry in dataclasses.fields(DPOConfig):
        if not entry.init or entry.name in NOT_FOR_A_TEST or entry.name in MISS:
            continue
        value = other_value(entry)
        if value is None:
            untried.append(entry.name)
            continue
        try:
            after = key_of({entry.name: value} | NEEDS.get(entry.name, {}))
        except (ValueError, ImportError):
            refused.append(entry.name)
            continue
        assert after == before, f"{entry.name} = {value!r} is a miss"
        tried.append(entry.name)
    print(f"{len(tried)} hit, {len(refused)} refused: {refused}; no other value: {untried}")
    wanted = {"learning_rate", "output_dir", "seed", "beta", "num_train_epochs", "run_name",
              "logging_steps", "per_device_train_batch_size", "data_seed", "weight_decay",
              "gradient_accumulation_steps", "shared_prefix", "micro_batch_tokens"}  # fmt: skip
    assert wanted <= set(tried)
    assert len(tried) >= 60
    assert len(refused) <= 12, refused


def test_what_shapes_the_rows_misses():
    assert key_of({"max_length": MISS["max_length"]})[1] != key_of({})[1]
    cut = {"max_length": MISS["max_length"]}
    for_both = key_of(cut), key_of(cut | {"truncation_mode": MISS["truncation_mode"]})
    assert for_both[0][0] == for_both[1][0]
    assert for_both[0][1] != for_both[1][1]
    for name in ("max_prompt_length", "max_completion_length"):
        assert key_of({name: MISS[name]})[1] != key_of({})[1]
    spelled = [row | {"prompt": f"</s>{row['prompt']}"} for row in PAIRS]
    literal = {"special_tokens_in_content": MISS["special_tokens_in_content"]}
    assert key_of({}, spelled)[1].isdisjoint(key_of(literal, spelled)[1])


def test_scored_turns_miss_and_single_answers_hit(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", PLAIN_CHAT_TEMPLATE)

    def turns(*texts):
        roles = ("assistant", "user") * len(texts)
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    prompt, assistant = [{"role": "user", "content": "a"}], {"score_turns": MISS["score_turns"]}
    row = {"prompt": prompt, "chosen": turns("b", "c", "d"), "rejected": turns("e", "f", "g")}
    assert key_of({}, [row])[1].isdisjoint(key_of(assistant, [row])[1])
    row |= {"chosen": turns("b"), "rejected": turns("e")}
    assert key_of({}, [row])[1] == key_of(assistant, [row])[1]


def test_order_subset_superset_and_duplicates_hit():
    whole = key_of({})[1]
    assert key_of({}, PAIRS[::-1])[1] == whole
    assert key_of({}, PAIRS[:2] * 3)[1] < whole
    assert key_of({}, ROWS[:9])[1] > whole
    assert len(whole) == 2 * len(PAIRS)


def test_no_field_of_the_adapter_matters():
    model = base()
    identity = reference_identity(model, torch.float32)
    plain = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    changes = [
        {"r": 8}, {"lora_alpha": 3}, {"lora_dropout": 0.4}, {"target_modules": "all-linear"},
        {"target_modules": ["down_proj"]}, {"use_rslora": True}, {"use_dora": True},
        {"init_lora_weights": False}, {"init_lora_weights": "gaussian"}, {"bias": "none"},
        {"layers_to_transform": [0]}, {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}}, {"modules_to_save": ["embed_tokens"]},
        {"exclude_modules": ["v_proj"]}, {"fan_in_fan_out": False}, {"lora_bias": True},
        {"inference_mode": True}, {"revision": "x"}, {"base_model_name_or_path": "x"},
    ]  # fmt: skip
    for change in changes:
        torch.manual_seed(1)
        adapted = add_adapter(copy.deepcopy(model), LoraConfig(**plain | change))
        assert reference_identity(adapted, torch.float32) == identity, change


def changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return value | {"another": 1}
    return [*value, 1] if isinstance(value, list) else 1


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
def test_every_field_of_the_model_config_misses_unless_it_is_listed(kind):
    model = base(kind(**SIZES))
    before = reference_identity(model, torch.float32)
    content = model.config.to_dict()
    missed = 0
    for name, value in content.items():
        if name in ("model_type", "_attn_implementation"):
            continue
        config = copy.deepcopy(model.config)
        described = content | {name: changed(value)}
        config.to_dict = lambda described=described: described
        object.__setattr__(model, "config", config)
        after = reference_identity(model, torch.float32)
        assert after["weights"] == before["weights"]
        assert (after == before) == (name in IGNORED_CONFIG_KEYS), name
        missed += after != before
    assert missed >= 12


def test_mixed_precision_matters_where_all_weights_are_trained():
    full = {"peft_config": False}
    half, whole = (key_of({"bf16": on}, **full) for on in (True, False))
    assert (half[0]["dtype"], whole[0]["dtype"]) == ("torch.bfloat16", "torch.float32")
    assert half[1] == whole[1]


def test_what_carries_the_states_of_packed_pairs_matters(monkeypatch):
    """Padded pairs run by the model's own code, packed ones by torch or by a kernel."""
    model = forking_model("qwen3.5")
    torch_form = reference_identity(model, torch.bfloat16)
    assert torch_form["states"] == "torch"
    padded = reference_identity(model, torch.bfloat16, attention=MODEL_ATTENTION)
    assert "states" not in padded
    monkeypatch.setattr(state_forks, "runs_kernel", lambda package, *_: package == "fla")
    kernel = reference_identity(model, torch.bfloat16)
    assert kernel["states"] == "fla"
    assert kernel | {"states": "torch"} == torch_form
    assert padded["attention"] != torch_form["attention"]
    assert "states" not in reference_identity(base(), torch.bfloat16)

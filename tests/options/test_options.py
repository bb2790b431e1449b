"""The options room and config.py: defaults, checks, presets, refusals."""

import copy
import dataclasses
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from fastdpo import ModelConfig
from fastdpo import options as options_room
from fastdpo.config import DPOConfig, cuda_has_bf16
from fastdpo.evaluate import EvaluationOptions
from fastdpo.losses import LOSSES
from fastdpo.merge import MergingOptions
from fastdpo.modeling.attention import ATTENTIONS
from fastdpo.options import (
    MODEL_ALIASES,
    ComparisonOptions,
    DataOptions,
    ModelOptions,
    PreferenceOptions,
    TokenizationOptions,
    TrainerDefaults,
    passes,
    presets,
    reference_folder,
    resolve_model,
)
from fastdpo.options.data import ScriptArguments
from fastdpo.options.removed import REMOVED_OPTIONS, suggest_option
from fastdpo.options.synonyms import FOREIGN_OPTIONS, SYNONYMS
from fastdpo.plan import PlanningOptions
from fastdpo.score import ScoringOptions

OWN = (
    ModelOptions, DataOptions, PreferenceOptions, TrainerDefaults,
    ComparisonOptions, EvaluationOptions, MergingOptions, PlanningOptions, ScoringOptions,
)  # fmt: skip


def names(kind: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


@pytest.fixture
def config(tmp_path):
    return lambda **options: DPOConfig(str(tmp_path), **options)


def test_every_own_option_has_ascii_help_that_argparse_can_print():
    for kind in OWN:
        for entry in dataclasses.fields(kind):
            text = entry.metadata["help"]
            assert text.isascii(), entry.name
            assert "%" not in text, entry.name
            assert text.endswith("."), entry.name


@pytest.mark.parametrize(
    ("written", "option"),
    [
        ("lr", "learning_rate"), ("lora_rank", "lora_r"), ("dpo_beta", "beta"),
        ("pref_beta", "beta"), ("epochs", "num_train_epochs"), ("num_epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"), ("cutoff_len", "max_length"),
        ("micro_batch_size", "per_device_train_batch_size"), ("sequence_len", "max_length"),
        ("lora_target", "lora_target_modules"), ("max_seq_length", "max_length"),
        ("finetuning_type", "qlora, lora and full"), ("load_in_8bit", "qlora"),
        ("val_set_size", "eval_dataset"), ("eval_ratio", "eval_dataset"), ("min_lr", "min_lr"),
        ("train_type", "qlora, lora and full"), ("eval_steps_per_epoch", "eval_steps"),
        ("evaluate", "eval_dataset"), ("early_stopping", "early_stopping_patience"),
    ],
)  # fmt: skip
def test_names_of_other_trainers_lead_to_the_right_option(written, option):
    known = names(ModelOptions) | names(DataOptions) | names(DPOConfig)
    advice = suggest_option(written, known, "--")
    assert option in advice
    assert "do_eval" not in advice


def test_choices_are_those_that_the_rooms_have():
    assert tuple(LOSSES) == options_room.LOSS_TYPES
    assert tuple(ATTENTIONS) == passes.ATTENTION_BACKENDS


def test_what_argparse_reads_of_an_option_holds_no_check():
    """transformers' parser hands the metadata of a field to argparse as it is."""
    for kind in (*OWN, DPOConfig):
        for entry in dataclasses.fields(kind):
            assert "check" not in entry.metadata, entry.name
    HfArgumentParser((DPOConfig, ModelConfig, ScriptArguments))
    assert {"beta", "max_length", "ref_spot_check", "dataset_num_proc"} <= DPOConfig.checks.keys()
    assert "beta" not in TokenizationOptions.checks


def test_removed_options_are_really_gone():
    existing = set().union(*(names(kind) for kind in (*OWN, DPOConfig)))
    assert not existing & set(REMOVED_OPTIONS)
    for name, advice in REMOVED_OPTIONS.items():
        assert advice.endswith("."), name


def test_names_of_other_trainers_get_the_option_of_the_same_meaning():
    training = set().union(*(names(kind) for kind in (ModelOptions, DataOptions, DPOConfig)))
    anywhere = training.union(*(names(kind) for kind in OWN))
    assert set(SYNONYMS.values()) <= anywhere
    assert not set(SYNONYMS) & training
    assert not set(FOREIGN_OPTIONS) & (training | set(REMOVED_OPTIONS) | set(SYNONYMS))
    assert not set(SYNONYMS) & set(REMOVED_OPTIONS)
    for advice in FOREIGN_OPTIONS.values():
        assert advice.endswith(".")
    for name, option in SYNONYMS.items():
        advice = suggest_option(name, training, "--")
        assert advice == f"it is --{option} here." or option == "adapter", name
    assert suggest_option("lora_rank", names(DPOConfig)) == (
        "it is lora_r of the commands, and belongs into peft_config here."
    )
    assert "leave it out" in suggest_option("lr", names(ComparisonOptions), "--")
    for word in ("evals", "do_evaluation", "do_training", "do_trian"):
        assert "do_" not in suggest_option(word, training).removeprefix("the nearest is ")


FLOATS = [
    (kind, entry.name)
    for kind in (*OWN, DPOConfig, ModelConfig)
    for entry in dataclasses.fields(kind)
    if entry.init and "float" in str(entry.type)
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_number_is_finite(value):
    assert len(FLOATS) > 30
    for kind, name in FLOATS:
        with pytest.raises(ValueError, match="finite"):
            kind(**{name: [value] if name == "loss_weights" else value})


def test_nearest_name_and_none():
    assert suggest_option("lerning_rate", ["learning_rate"], "--") == (
        "the nearest is --learning_rate"
    )
    assert suggest_option("xyzzy", ["learning_rate"]) == "no option has a name like it"
    assert "max_completion_length" in suggest_option("max_target_length", [])


@pytest.mark.parametrize(
    ("kind", "options", "flags"),
    [
        (ModelOptions, {"qlora": True, "lora": True}, ["--qlora", "--lora"]),
        (ModelOptions, {"lora": True, "full": True}, ["--lora", "--full"]),
        (ModelOptions, {"full": True, "use_peft": True}, ["--full", "--use_peft"]),
        (ModelOptions, {"full": True, "load_in_4bit": True}, ["--full", "--load_in_4bit"]),
        (ModelOptions, {"full": True, "use_rslora": True}, ["--full", "--use_rslora"]),
        (ModelOptions, {"full": True, "use_dora": True}, ["--full", "--use_dora"]),
        (ModelOptions, {"load_in_4bit": True}, ["--load_in_4bit", "--use_peft", "--qlora"]),
        (ModelOptions, {"dtype": "int8"}, ["--dtype", "bfloat16"]),
        (ModelOptions, {"lora_r": 0}, ["--lora_r", "1 or more"]),
        (ModelOptions, {"lora_r": 8.0}, ["--lora_r"]),
        (ModelOptions, {"lora_r": True}, ["--lora_r"]),
        (ModelOptions, {"lora_alpha": 0}, ["--lora_alpha"]),
        (ModelOptions, {"lora_dropout": 1.0}, ["--lora_dropout", "below 1"]),
        (ModelOptions, {"lora_dropout": -0.1}, ["--lora_dropout", "at least 0"]),
        (ModelOptions, {"lora_target_modules": []}, ["--lora_target_modules"]),
        (DataOptions, {"max_line_mib": 0}, ["--max_line_mib", "1 or more"]),
        (PreferenceOptions, {"beta": 0}, ["--beta", "above 0"]),
        (PreferenceOptions, {"beta": -0.1}, ["--beta"]),
        (PreferenceOptions, {"beta": float("nan")}, ["--beta", "finite"]),
        (PreferenceOptions, {"beta": float("inf")}, ["--beta"]),
        (PreferenceOptions, {"beta": "0.1"}, ["--beta", "'0.1'"]),
        (PreferenceOptions, {"loss_type": "ppo"}, ["--loss_type", "ppo", "sigmoid"]),
        (PreferenceOptions, {"loss_type": ["aot_pair"]}, ["--loss_type", "aot_unpaired is its"]),
        (PreferenceOptions, {"loss_type": "kto_pair"}, ["--loss_type", "bco_pair"]),
        (PreferenceOptions, {"loss_type": "cdpo"}, ["--loss_type", "--label_smoothing"]),
        (PreferenceOptions, {"loss_type": []}, ["--loss_type", "empty"]),
        (PreferenceOptions, {"loss_type": ["sft", "sft"]}, ["--loss_type", "twice"]),
        (PreferenceOptions, {"loss_weights": [1.0, 2.0]}, ["--loss_weights", "2 numbers for 1"]),
        (PreferenceOptions, {"loss_weights": [-1.0]}, ["--loss_weights", "at least 0"]),
        (PreferenceOptions, {"label_smoothing": 1.0}, ["--label_smoothing", "below 1"]),
        (PreferenceOptions, {"loss_type": "exo_pair"}, ["--label_smoothing", "exo_pair", "1e-3"]),
        (
            PreferenceOptions,
            {"loss_type": "robust", "label_smoothing": 0.5},
            ["--label_smoothing", "robust", "less than 0.5"],
        ),
        (
            PreferenceOptions,
            {"loss_type": ["hinge", "sft"], "label_smoothing": 0.1},
            ["--label_smoothing", "hinge sft", "leave it out"],
        ),
        (PreferenceOptions, {"f_divergence_type": "kl"}, ["--f_divergence_type", "forward_kl"]),
        (
            PreferenceOptions,
            {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "js_divergence"},
            ["--f_divergence_type", "apo_zero", "sigmoid_norm"],
        ),
        (
            PreferenceOptions,
            {"loss_type": "orpo", "f_divergence_type": "js_divergence"},
            ["--f_divergence_type", "orpo", "leave it out"],
        ),
        (
            PreferenceOptions,
            {"f_alpha_divergence_coef": float("inf")},
            ["--f_alpha_divergence_coef is inf; it must be a finite number. "],
        ),
        (PreferenceOptions, {"f_alpha_divergence_coef": 0.7}, ["--f_alpha_divergence_coef"]),
        (PreferenceOptions, {"discopop_tau": 0.0}, ["--discopop_tau", "above 0 and at most 1"]),
        (PreferenceOptions, {"discopop_tau": 1.5}, ["--discopop_tau", "at most 1"]),
        (PreferenceOptions, {"discopop_tau": 0.1}, ["--discopop_tau", "discopop"]),
        (PreferenceOptions, {"simpo_gamma": -0.5}, ["--simpo_gamma", "at least 0"]),
        (PreferenceOptions, {"simpo_gamma": 1.0}, ["--simpo_gamma", "simpo"]),
        (PreferenceOptions, {"ld_alpha": 1.1}, ["--ld_alpha", "at least 0 and at most 1"]),
        (PreferenceOptions, {"ld_alpha": 0.5, "loss_type": "sft"}, ["--ld_alpha", "sft"]),
        (
            PreferenceOptions,
            {"ld_alpha": 0.5, "ref_token_logps": "off"},
            ["--ld_alpha", "--ref_token_logps"],
        ),
        (
            PreferenceOptions,
            {"use_weighting": True, "loss_type": ["sft", "aot"]},
            ["--use_weighting", "aot"],
        ),
        (
            PreferenceOptions,
            {"reference_free": True, "sync_ref_model": True},
            ["--sync_ref_model", "--reference_free"],
        ),
        (
            PreferenceOptions,
            {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0},
            ["--ref_model_mixup_alpha", "above 0"],
        ),
        (
            PreferenceOptions,
            {"sync_ref_model": True, "ref_model_sync_steps": 0},
            ["--ref_model_sync_steps", "1 or more"],
        ),
        (PreferenceOptions, {"ref_model_sync_steps": 5}, ["--ref_model_sync_steps"]),
        (PreferenceOptions, {"ref_model_mixup_alpha": 0.5}, ["--sync_ref_model"]),
        (PreferenceOptions, {"max_length": 1}, ["--max_length", "2 or more"]),
        (PreferenceOptions, {"max_length": 1e3}, ["--max_length"]),
        (PreferenceOptions, {"truncation_mode": "keep_end"}, ["--truncation_mode", "keep_start"]),
        (PreferenceOptions, {"truncation_mode": "keep_end"}, ["cuts each side", "keep_completion"]),
        (PreferenceOptions, {"max_prompt_length": 0}, ["--max_prompt_length", "1 or more"]),
        (PreferenceOptions, {"max_completion_length": 1.5}, ["--max_completion_length", "1.5"]),
        (
            PreferenceOptions,
            {"max_prompt_length": 1024},
            ["--max_prompt_length is 1024", "no room", "--max_length 1024"],
        ),
        (PreferenceOptions, {"special_tokens_in_content": "x"}, ["literal", "allow", "error"]),
        (PreferenceOptions, {"micro_batch_tokens": 127}, ["--micro_batch_tokens", "128"]),
        (
            PreferenceOptions,
            {"activations": "keep_attention", "attention": "flex"},
            ["--activations keep_attention", "--attention auto"],
        ),
        (PreferenceOptions, {"activations": "drop"}, ["--activations", "recompute", "offload"]),
        (PreferenceOptions, {"mlp_tile_tokens": 64}, ["--mlp_tile_tokens", "128"]),
        (PreferenceOptions, {"embeddings": "disk"}, ["--embeddings", "gpu", "host"]),
        (PreferenceOptions, {"shared_prefix": "on"}, ["--shared_prefix", "auto", "off"]),
        (PreferenceOptions, {"packing": "on"}, ["--packing", "auto", "off"]),
        (PreferenceOptions, {"attention": "eager"}, ["--attention", "varlen", "flex"]),
        (PreferenceOptions, {"ref_cache": " "}, ["--ref_cache"]),
        (PreferenceOptions, {"ref_token_logps": "no"}, ["--ref_token_logps", "on", "off"]),
        (PreferenceOptions, {"ref_versions": "x"}, ["--ref_versions", "warn", "strict"]),
        (PreferenceOptions, {"ref_spot_check": -1}, ["--ref_spot_check", "0 or more"]),
        (PreferenceOptions, {"ref_spot_check": True}, ["--ref_spot_check"]),
        (PreferenceOptions, {"model_init_kwargs": "{x"}, ["--model_init_kwargs", "JSON"]),
        (PreferenceOptions, {"model_init_kwargs": "[1]"}, ["--model_init_kwargs", "dict"]),
    ],
)
def test_a_wrong_value_is_refused_by_its_flag(kind, options, flags):
    with pytest.raises(ValueError, match="--") as refused:
        kind(**options)
    for flag in flags:
        assert flag in str(refused.value)


def test_values_at_the_edge_are_accepted_and_normalised():
    options = PreferenceOptions(
        beta=1,
        loss_type="sigmoid",
        max_length=8,
        micro_batch_tokens=128,
        ref_cache=Path("store"),
        model_init_kwargs='{"revision": "main"}',
    )
    assert options.loss_type == ["sigmoid"]
    assert options.ref_cache == "store"
    assert options.model_init_kwargs == {"revision": "main"}
    mixed = PreferenceOptions(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=(0.8, 0.2, 1))
    assert mixed.loss_weights == [0.8, 0.2, 1]
    assert PreferenceOptions(ld_alpha=0.0, ref_token_logps="off", ref_cache="off").ld_alpha == 0
    assert PreferenceOptions(max_length=None).max_length is None
    assert PreferenceOptions().loss_type is not PreferenceOptions().loss_type
    assert ModelOptions(lora_target_modules="q_proj").lora_target_modules == ["q_proj"]
    assert ModelOptions(lora_target_modules=["all-linear"]).lora_target_modules is None
    assert ModelOptions(lora_dropout=0, lora_r=1).lora_r == 1


@pytest.mark.parametrize(
    ("given", "qlora", "lora"),
    [
        ({}, False, False),
        ({"use_peft": True}, False, True),
        ({"use_peft": True, "qlora": True}, True, False),
        ({"use_peft": True, "load_in_4bit": True}, True, False),
        ({"lora": True, "load_in_4bit": True}, True, False),
        ({"qlora": True, "load_in_4bit": True}, True, False),
    ],
)
def test_names_of_trl_say_what_moves(given, qlora, lora):
    options = ModelOptions(**given)
    assert (options.qlora, options.lora) == (qlora, lora)
    again = dataclasses.replace(options)
    assert (again.qlora, again.lora) == (qlora, lora)


def test_model_aliases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MODEL_ALIASES["llama-7b"] == "meta-llama/Llama-2-7b-hf"
    path, sentence = resolve_model("llama-7b")
    assert path == "meta-llama/Llama-2-7b-hf"
    assert sentence is not None
    assert sentence.startswith("llama-7b means " + path)
    assert resolve_model("Qwen3-8B")[0] == "Qwen/Qwen3-8B"
    assert resolve_model("org/other") == ("org/other", None)
    (tmp_path / "llama-7b").mkdir()
    assert resolve_model("llama-7b") == ("llama-7b", None)


def test_reference_folder(monkeypatch):
    monkeypatch.delenv("FASTDPO_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert reference_folder(None) == Path("/home/u/.cache/fastdpo/reference")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert reference_folder(None) == Path("/xdg/fastdpo/reference")
    monkeypatch.setenv("FASTDPO_CACHE", "~/own")
    assert reference_folder(None) == Path("/home/u/own/reference")
    assert reference_folder("~/here") == Path("/home/u/here")
    assert reference_folder("off") is None


def test_a_user_without_a_home_is_told_where_to_store(monkeypatch):
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no")))
    for value in (None, "~/here"):
        with pytest.raises(ValueError, match="set FASTDPO_CACHE"):
            reference_folder(value)
    assert reference_folder("off") is None


def test_presets_and_what_makes_one_give_way():
    values = presets({})
    assert values["learning_rate"] == 1e-5
    assert values["lr_scheduler_type"] == "cosine"
    assert values["warmup_steps"] == 0.1
    assert values["num_train_epochs"] == 1
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert values[batch[0]] * values[batch[1]] == 32
    assert values["eval_strategy"] == "epoch"
    given = {"gradient_accumulation_steps": 4}
    assert {**presets(given), **given}[batch[0]] == 8
    given = {"per_device_train_batch_size": 4}
    assert {**presets(given), **given}[batch[1]] == 1
    assert presets({"eval_steps": 50})["eval_strategy"] == "steps"
    assert presets({"full": True})["learning_rate"] == 1e-6
    assert presets({"full": False})["learning_rate"] == 1e-5


def test_run_options_are_inherited_options_of_the_config(config):
    assert names(TrainerDefaults) <= names(DPOConfig) - names(PreferenceOptions)
    DPOConfig(**presets({}))


def test_config_keeps_the_defaults_of_trl(config):
    theirs = pytest.importorskip("trl").DPOConfig(output_dir="x", bf16=False)
    ours = config()
    differ = {"output_dir", "truncation_mode", "logging_nan_inf_filter", "remove_unused_columns"}
    shared = names(type(theirs)) & names(DPOConfig) - differ
    assert {"learning_rate", "beta", "loss_type", "max_length", "logging_steps"} <= shared
    for name in shared - {"accelerator_config", "bf16"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert not names(type(theirs)) - names(DPOConfig)


def test_output_dir_comes_first_and_has_a_default():
    assert DPOConfig("runs/a").output_dir == "runs/a"
    assert DPOConfig().output_dir == "fastdpo-output"


def test_bf16_follows_the_card(config, monkeypatch):
    assert config().bf16 is cuda_has_bf16()
    assert config(bf16=False).bf16 is False
    monkeypatch.setattr("fastdpo.config.cuda_has_bf16", lambda: True)
    assert config(use_cpu=True).bf16 is False
    assert config(fp16=True).bf16 is False


def test_both_names_of_checkpointing_work_without_a_warning(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for options, wanted in (
            ({}, True),
            ({"gradient_checkpointing": False}, False),
            ({"activation_checkpointing": False}, False),
            ({"gradient_checkpointing": True}, True),
        ):
            made = config(**options)
            assert made.gradient_checkpointing is made.activation_checkpointing is wanted
        made = config(gradient_checkpointing_kwargs='{"use_reentrant": false}')
    assert made.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert made.gradient_checkpointing_kwargs == {"use_reentrant": False}
    with pytest.raises(ValueError, match="use --activations"):
        config(activation_checkpointing_kwargs={"every_n_layers": 2})


@pytest.mark.parametrize(
    "options",
    [
        {"auto_find_batch_size": True},
        {"deepspeed": {"zero_optimization": {}}},
        {"fsdp": "full_shard"},
        {"fsdp": True},
        {"label_smoothing_factor": 0.1},
        {"torch_compile": True},
        {"torch_compile_backend": "inductor"},
        {"use_liger_kernel": True},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"},
        {"ignore_data_skip": True},
        {"logging_nan_inf_filter": True},
        {"remove_unused_columns": True},
        {"enable_jit_checkpoint": True},
        {"debug": "tpu_metrics_debug"},
        {"beta": 0.0},
    ],
)
def test_config_refuses_by_name(config, options):
    with pytest.raises(ValueError, match=f"--{next(iter(options))} "):
        config(**options)


def test_config_refuses_processes_without_a_group(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    # LOCAL_RANK, which the launchers set, is missing: on a GPU accelerate would train alone.
    monkeypatch.setattr("fastdpo.config.TrainingArguments.__post_init__", lambda self: None)
    with pytest.raises(ValueError, match=r"one of 2 \(WORLD_SIZE\).* torchrun"):
        config(bf16=False)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_config_refuses_what_would_shard_the_model(config, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match="every GPU holds the whole model"):
        config()


def test_unknown_options_get_advice_from_python_too(config):
    with pytest.raises(TypeError, match=r"'max_target_length': use max_comp"):
        config(max_target_length=512)
    with pytest.raises(TypeError, match=r"'lerning_rate': the nearest is learning_rate"):
        config(lerning_rate=1e-5)


def test_one_gpu_is_used_of_two(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = config(bf16=False)
    assert made.n_gpu == 1
    assert made.train_batch_size == made.per_device_train_batch_size


def test_config_survives_copying_pickling_and_a_round_trip(config):
    made = config(beta=0.2, bf16=False, max_length=None)
    again = DPOConfig(**made.to_dict())
    replaced = dataclasses.replace(made, gradient_accumulation_steps=4)
    for other in (again, replaced, copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert other.beta == 0.2
        assert other.max_length is None
        assert other.gradient_checkpointing is True
    assert replaced.gradient_accumulation_steps == 4

"""What TRL's scripts import beside the trainer: parser, model options, adapters; YAML for TRL."""

import argparse
import dataclasses
import logging
import os
from dataclasses import dataclass

import pytest
import torch

from fastdpo import (
    DPOConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from fastdpo.cli.parser import parse
from fastdpo.options import DataOptions, ModelOptions


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="the oracle is TRL (pip install fastdpo[dev])")


@dataclass
class Extra:
    steps: int = 3
    rate: float = 0.5
    names: list[str] | None = None
    flag: bool = True


def test_the_parser_lays_the_command_line_over_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTDPO_TEST_VARIABLE", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(
        "env: {FASTDPO_TEST_VARIABLE: 7}\nsteps: 5\nrate: 5e-7\nnames: [a, b]\ndataset_name: d\n"
    )
    parser = TrlParser((Extra, ScriptArguments))
    for argv in (["--config", str(path), "--steps", "9"], ["--steps=9", f"--config={path}"]):
        extra, data = parser.parse_args_and_config(argv)
        assert extra == Extra(9, 5e-7, ["a", "b"])
        assert data.dataset_name == "d"
        assert os.environ.pop("FASTDPO_TEST_VARIABLE") == "7"
    assert TrlParser(Extra).parse_args_and_config(["--no_flag"]) == (Extra(flag=False),)
    data = TrlParser(ScriptArguments).parse_args_and_config(["--no_dataset_streaming"])[0]
    assert data.dataset_streaming is False
    # Flags that are on in TRL and decided later or off here.
    argv = ["--no_gradient_checkpointing", "--no-remove-unused-columns", "--use_cpu"]
    (made,) = TrlParser(DPOConfig).parse_args_and_config(argv)
    assert (made.activation_checkpointing, made.remove_unused_columns) == (False, False)


def test_what_the_parser_does_with_unknown_names(tmp_path, caplog):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\nmax_target_length: 3\n")
    given = ["--config", str(path)]
    with pytest.raises(ValueError, match=r"--max_target_length; use max_completion_length"):
        TrlParser(Extra).parse_args_and_config(given)
    (extra,) = TrlParser(Extra).parse_args_and_config(given, fail_with_unknown_args=False)
    assert extra.steps == 5
    assert "not used: unknown option --max_target_length" in caplog.text
    with pytest.raises(ValueError, match=r"unknown option --stepz; the nearest is --steps"):
        TrlParser(Extra).parse_args_and_config(["--stepz", "3"])
    theirs = ["--max_target_length", "3"], ["--stepz", "4"]
    parse = TrlParser(Extra).parse_args_and_config
    both = parse([*given, *theirs[1]], return_remaining_strings=True)
    assert both == (Extra(5), [*theirs[0], *theirs[1]])
    options = {"return_remaining_strings": True, "separate_remaining_strings": True}
    assert parse([*given, *theirs[1]], **options) == (Extra(5), *theirs)
    path.write_text("env: 3\n")
    with pytest.raises(ValueError, match="env holds 3"):
        parse(given)
    with pytest.raises(ValueError, match="--config stands alone"):
        parse(["--config"])
    with pytest.raises(ValueError, match="a field named config"):
        TrlParser(dataclasses.make_dataclass("Wrong", [("config", int, 3)]))


def test_the_parser_serves_subcommands_as_make_parser_builds_them(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 5\n")
    parser = TrlParser(prog="own")
    commands = parser.add_subparsers(dest="command", parser_class=TrlParser)
    commands.add_parser("dpo", help="Train.", dataclass_types=(Extra,))
    (namespace,) = parser.parse_args_and_config(
        ["dpo", "--config", str(tmp_path / "run.yaml"), "--rate", "0.1"]
    )
    assert namespace == argparse.Namespace(command="dpo", steps=5, rate=0.1, names=None, flag=True)


def test_model_config_has_the_names_and_defaults_of_trl(trl):
    ours = {entry.name: entry.default for entry in dataclasses.fields(ModelConfig)}
    theirs = {entry.name: entry.default for entry in dataclasses.fields(trl.ModelConfig)}
    assert ours.pop("use_bnb_nested_quant") is True
    assert theirs.pop("use_bnb_nested_quant") is False
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_8bit": True}, "--load_in_8bit cannot work here: .* Use --load_in_4bit"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "--bnb_4bit_quant_storage .* leave it out"),
        ({"lora_task_type": "SEQ_CLS"}, "--lora_task_type .* leave it out"),
        ({"load_in_4bit": True}, "--load_in_4bit is given without --use_peft"),
        ({"dtype": "int8"}, "--dtype is 'int8'; it must be one of auto"),
        ({"bnb_4bit_quant_type": "int4"}, "--bnb_4bit_quant_type is 'int4'"),
        ({"lora_r": 0}, "--lora_r is 0"),
        ({"lora_alpha": 0}, "--lora_alpha is 0"),
        ({"lora_dropout": 1.0}, "--lora_dropout is 1.0"),
    ],
)
def test_model_config_refuses_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**options)


def test_an_attention_of_the_users_choice_is_said_to_change_nothing(caplog):
    assert ModelConfig(attn_implementation="flash_attention_2").attn_implementation is None
    assert "--attn_implementation flash_attention_2 changes nothing" in caplog.text


def test_quantization_config_is_nf4_twice_quantized():
    assert get_quantization_config(ModelConfig()) is None
    made = get_quantization_config(ModelConfig(load_in_4bit=True, use_peft=True, dtype="bfloat16"))
    assert (made.load_in_4bit, made.bnb_4bit_quant_type) == (True, "nf4")
    assert made.bnb_4bit_use_double_quant
    assert made.bnb_4bit_compute_dtype == torch.bfloat16
    other = {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": False, "dtype": None}
    made = get_quantization_config(ModelConfig(load_in_4bit=True, use_peft=True, **other))
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_use_double_quant) == ("fp4", False)


def test_peft_config_is_that_of_trl(trl):
    assert get_peft_config(ModelConfig()) is None
    for options in (
        {},
        {"lora_r": 8, "lora_alpha": 3, "lora_dropout": 0.2, "use_rslora": True},
        {"lora_target_modules": ["all-linear"], "use_dora": True},
        {"lora_target_modules": ["q_proj", "v_proj"], "lora_modules_to_save": ["embed_tokens"]},
        {"lora_target_parameters": ["mlp.experts.gate_up_proj"]},
    ):
        ours, theirs = (kind(use_peft=True, **options) for kind in (ModelConfig, trl.ModelConfig))
        assert get_peft_config(ours).to_dict() == trl.get_peft_config(theirs).to_dict()
    one = get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["q_proj"]))
    assert one.target_modules == {"q_proj"}, "a name, no pattern for whole paths"


# YAML files for other trainers through our own command

TRL_YAML = """
model_name_or_path: alignment-handbook/zephyr-7b-sft-qlora
dtype: bfloat16
use_peft: true
load_in_4bit: true
lora_r: 128
lora_alpha: 128
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
dataset_name: HuggingFaceH4/ultrafeedback_binarized
dataset_train_split: train_prefs
dataset_test_split: test_prefs
beta: 0.01
do_eval: true
eval_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 4
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
learning_rate: 5.0e-6
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: paged_adamw_32bit
output_dir: out
padding_free: true
precompute_ref_log_probs: true
per_device_train_batch_size: 4
per_device_eval_batch_size: 8
save_strategy: steps
save_steps: 100
save_total_limit: 1
seed: 42
trust_remote_code: true
"""


def test_a_yaml_file_for_trl_is_one_for_our_command(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TRL_YAML)
    parsed = parse("train", [ModelOptions, DataOptions], ["--config", str(path)], training=True)
    assert parsed.model.qlora
    assert (parsed.model.lora_r, parsed.model.dtype) == (128, "bfloat16")
    made = parsed.training
    assert (made.beta, made.max_prompt_length, made.learning_rate) == (0.01, 512, 5e-6)
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps == 16
    assert parsed.model.trust_remote_code
    assert made.trust_remote_code


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("torch_dtype: bfloat16", "use dtype."),
        ("attn_implementation: flash_attention_2", "fastdpo's own; leave it out."),
        ("load_in_8bit: true", "use --qlora."),
        ("bnb_4bit_quant_type: nf4", "leave it out."),
        ("use_bnb_nested_quant: true", "leave it out."),
        ("dataset_mixer: {HuggingFaceH4/ultrafeedback_binarized: 1.0}", "or datasets with"),
        ("dataset_splits: [train_prefs, test_prefs]", "use dataset_name"),
        ("preprocessing_num_workers: 12", "leave it out."),
        ("warmup_ratio: 0.1", "use warmup_steps with a value below 1."),
        ("use_flash_attention_2: true", "leave it out."),
        ("ignore_bias_buffers: true", "leave it out."),
    ],
)
def test_what_such_files_hold_and_we_do_not_take_gets_advice(tmp_path, capsys, line, advice):
    path = tmp_path / "run.yaml"
    path.write_text(f"beta: 0.01\n{line}\n")
    with pytest.raises(SystemExit):
        parse("train", [ModelOptions, DataOptions], ["--config", str(path)], training=True)
    told = capsys.readouterr().err
    assert f"unknown key {line.split(':')[0]}; " in told
    assert told.strip().endswith(advice) or advice in told


# DPOConfig


def test_names_of_trl_that_change_nothing_say_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        config = DPOConfig(str(tmp_path), padding_free=True, precompute_ref_log_probs=True)
        dataclasses.replace(config, beta=0.2)
        DPOConfig(**config.to_dict())
    assert "changes nothing" not in caplog.text
    DPOConfig(str(tmp_path), pad_token="<pad>", per_device_eval_batch_size=2)
    for name in ("pad_token", "per_device_eval_batch_size"):
        assert f"--{name} changes nothing: " in caplog.text

"""cli/parser.py and cli/arguments.py: parsing, YAML, presets, help. One subprocess, for help."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fastdpo.cli.parser import parse
from fastdpo.options import DataOptions, ModelOptions, PreferenceOptions
from fastdpo.version import __version__

ROOT = Path(__file__).parents[2]
GROUPS = (ModelOptions, DataOptions)


@dataclass
class Extra:
    """What a command adds of its own."""

    _argument_group_name = "This command"

    dry_run: bool = field(default=False, metadata={"help": "Stop before training."})
    sizes: list[int] | None = field(default=None, metadata={"help": "Sizes."})


def train(*argv: str):
    return parse("train", GROUPS, argv, training=True)


def score(*argv: str):
    return parse("evaluate", (*GROUPS, PreferenceOptions, Extra), argv, training=False)


@pytest.fixture
def refusal(capsys):
    """Run a parse that must end with exit code 2 and one line; gives the line."""

    def run(call, *argv: str) -> str:
        with pytest.raises(SystemExit) as ended:
            call(*argv)
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_presets_lie_below_what_the_user_gives():
    parsed = train("--qlora")
    assert parsed.model.qlora
    assert parsed.explicit == {"qlora"}
    made = parsed.training
    assert (made.learning_rate, made.lr_scheduler_type, made.warmup_steps) == (1e-5, "cosine", 0.1)
    assert (made.num_train_epochs, made.max_length) == (1, 1024)
    assert (made.score_turns, PreferenceOptions().score_turns) == ("assistant", "all")
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps == 32
    made = train("--learning_rate", "5e-6", "--gradient_accumulation_steps", "2").training
    assert made.learning_rate == 5e-6
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps == 16
    assert train("--full").training.learning_rate == 1e-6
    assert train("--eval_steps", "0.5").training.eval_strategy == "steps"


def test_spellings():
    parsed = train(
        *("--model", "m", "--dataset", "d.jsonl", "--lora-r", "8", "--no_disable_dropout"),
        *("--max-length", "none", "--beta=0.2", "--ref-cache", "off", "--lora", "true"),
        *("--lora_target_modules", "q_proj", "v_proj", "--report_to", "none", "--max_steps", "-1"),
    )
    assert parsed.model.model_name_or_path == "m"
    assert parsed.data.dataset_name == "d.jsonl"
    assert (parsed.model.lora_r, parsed.model.lora) == (8, True)
    assert parsed.model.lora_target_modules == ["q_proj", "v_proj"]
    assert parsed.training.max_length is None
    assert parsed.training.beta == 0.2
    assert parsed.training.ref_cache == "off"
    assert not parsed.training.disable_dropout
    assert {"model_name_or_path", "dataset_name", "disable_dropout", "beta"} <= parsed.explicit
    assert train("--bf16", "false").training.bf16 is False
    assert train("--no-disable-dropout").training.disable_dropout is False
    assert train("--gradient_checkpointing", "false").training.activation_checkpointing is False


def test_a_command_without_training_takes_its_own_groups():
    parsed = score("--dry_run", "--beta", "0.5", "--sizes", "1", "2")
    assert parsed.group(Extra) == Extra(dry_run=True, sizes=[1, 2])
    assert parsed.group(PreferenceOptions).beta == 0.5
    assert score().explicit == frozenset()


def test_yaml_below_the_command_line(yaml_file):
    path = yaml_file(
        "model: llama-7b\nlearning-rate: 5e-6\nqlora: true\nbeta: 1\nmax_length: null\n"
        "lora_target_modules: [q_proj, v_proj]\nloss_type: sigmoid\nrun_name: 7\n"
        "model_init_kwargs:\n  revision: main\nsave_steps: 0.25\nreport_to: [none]\nseed: '3'\n"
    )
    parsed = train("--config", path, "--beta", "0.3")
    made = parsed.training
    assert parsed.model.model_name_or_path == "llama-7b"
    assert parsed.model.qlora is True
    assert parsed.model.lora_target_modules == ["q_proj", "v_proj"]
    assert made.learning_rate == 5e-6
    assert made.beta == 0.3
    assert made.max_length is None
    assert made.loss_type == ["sigmoid"]
    assert made.run_name == "7"
    assert made.model_init_kwargs == {"revision": "main"}
    assert made.save_steps == 0.25
    assert made.report_to == []
    assert made.seed == 3
    assert made.lr_scheduler_type == "cosine"
    assert {"learning_rate", "max_length", "model_name_or_path", "beta"} <= parsed.explicit
    assert score("--config", yaml_file("")).explicit == frozenset()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_rank: 3", ["unknown key lora_rank", "it is lora_r here"]),
        ("max_target_length: 3", ["unknown key max_target_length", "use max_completion_length"]),
        ("beta: high", ["beta", "'high'", "float"]),
        ("beta: [0.1]", ["beta", "needs a float", "not a list"]),
        ("beta: null", ["beta", "not nothing"]),
        ("max_length: true", ["max_length", "not a bool"]),
        ("max_length: 10.5", ["max_length", "10.5", "int"]),
        ("dry_run: maybe", ["dry_run", "maybe"]),
        ("dtype: int8", ["dtype", "int8", "bfloat16"]),
        ("model_name_or_path: {a: 1}", ["model_name_or_path", "not a dict"]),
        ("beta: 0", ["--beta", "above 0"]),
        ("- beta", ["holds a list", "beta: 0.1"]),
        ("beta: [0.1", ["not YAML", "line 1"]),
        ("model: a\nmodel_name_or_path: b", ["model_name_or_path is set twice"]),
        ("model_init_kwargs:\n  1: [1]", ["model_init_kwargs", "the key 1", "quote it"]),
        ("model_init_kwargs: {on: 1}", ["model_init_kwargs", "the key True"]),
        ("sequence_len: 8", ["it is max_length here"]),
        ("val_set_size: 0.1", ["unknown key val_set_size", "eval_dataset"]),
    ],
)
def test_yaml_refusals(yaml_file, refusal, text, words):
    path = yaml_file(text)
    line = refusal(score, "--config", path)
    for word in [*words] + ([path] if "--" not in line else []):
        assert word in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--lerning_rate", "1e-5"],
            ["unknown option --lerning_rate; the nearest is --learning_r"],
        ),
        (["--modle=x"], ["unknown option --modle; the nearest is --model"]),
        (["--qlora", "--learn", "1"], ["unknown option --learn;"]),
        (["--max-target-length", "512"], ["unknown option --max_target_length; use max_comp"]),
        (
            ["--precompute_ref_log_probs", "--ref_cache", "off"],
            ["--precompute_ref_log_probs asks for", "--ref_cache off"],
        ),
        (["--warmup_ratio", "0.1"], ["use warmup_steps"]),
        (["llama-7b"], ["'llama-7b' stands alone", "--model NAME"]),
        (["--beta", "high"], ["--beta", "'high'"]),
        (["--beta"], ["--beta", "expected one argument"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--qlora", "--full"], ["--qlora and --full exclude each other"]),
        (["--beta", "0"], ["--beta is 0.0", "above 0"]),
        (["--torch_compile"], ["--torch_compile is True", "cannot work here"]),
        (["--lr_scheduler_type", "zigzag"], ["zigzag", "cosine"]),
        (["--config", "/nowhere/run.yaml"], ["/nowhere/run.yaml"]),
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size is 0"]),
        (["--dataset", "a", "--dataset", "b"], ["--dataset", "given twice; keep one"]),
        (["--model", "a", "--model_name_or_path=b"], ["--model and --model_name_or_path", "twice"]),
        (["--lora", "--no_lora"], ["--lora and --no_lora", "twice"]),
        (["--loss_type", "sft", "--loss_type", "ipo"], ["write all values behind one"]),
        (["--config", "a", "--config", "b"], ["--config", "twice"]),
        (["--save_steps", "nan"], ["--save_steps is nan", "finite"]),
        (["--learning_rate", "inf"], ["--learning_rate is inf", "finite"]),
        (["--lr_scheduler_kwargs", '{"min_lr": NaN}'], ["--lr_scheduler_kwargs is nan", "finite"]),
        (["--accelerator_config", '{"split": 1}'], ["split", "--accelerator_config"]),
        (["--lr", "1e-5"], ["it is --learning_rate here"]),
        (["--dpo-beta=0.1"], ["it is --beta here"]),
        (["--epochs", "1"], ["it is --num_train_epochs here"]),
        (["--batch_size", "1"], ["it is --per_device_train_batch_size here"]),
    ],
)
def test_refusals_are_one_line_and_exit_2(refusal, argv, words):
    line = refusal(train, *argv)
    for word in words:
        assert word in line


def test_version_and_full_help(capsys):
    for argv, words in (
        (["--version"], [f"fastdpo {__version__}\n"]),
        (["--help_all"], ["--qlora", "--beta", "--weight_decay", "--hub_model_id"]),
    ):
        with pytest.raises(SystemExit) as ended:
            train(*argv)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        for word in words:
            assert word in text
    for entry in dataclasses.fields(DataOptions):
        assert text.count(f"--{entry.name},") + text.count(f"--{entry.name} ") >= 1


HELP = """
import json, sys
from fastdpo.train import main
try:
    main(["--help"])
finally:
    heavy = {"torch", "datasets", "transformers.training_args", "fastdpo.config", "peft"}
    sys.stderr.write(json.dumps(sorted(heavy & set(sys.modules))))
"""


def test_help_imports_nothing_heavy():
    ran = run(["-c", HELP])
    assert ran.returncode == 0, ran.stderr
    for word in ("Model:", "Data:", "--qlora", "--beta", "--ref_cache", "--learning_rate"):
        assert word in ran.stdout
    assert "--weight_decay" not in ran.stdout
    assert json.loads(ran.stderr) == []


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_optional_booleans_are_flags():
    assert parse("train", [ModelOptions], ["--disable_tqdm"], training=True).training.disable_tqdm


def test_yaml_that_turns_a_word_into_a_boolean_says_so(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("ref_cache: off\n")
    with pytest.raises(SystemExit):
        parse("train", [ModelOptions], ["--config", str(tmp_path / "run.yaml")], training=True)
    assert "quote it" in capsys.readouterr().err


def test_numbers_inside_a_mapping_are_numbers(yaml_file):
    """1e-6 is one in YAML 1.2 and in Python, not in 1.1; quoted, and at the top, it is text."""
    made = train(
        "--config",
        yaml_file(
            "model_revision: 12e4\nlearning_rate: 1e-5\nloss_weights: [1e-1]\n"
            "lr_scheduler_kwargs: {min_lr: 1e-6, a: '1e-6', b: -2E+3, c: 5e-1, d: e5, e: [1.5e2]}\n"
        ),
    )
    assert made.model.model_revision == "12e4"
    assert made.training.learning_rate == 1e-5
    assert made.training.loss_weights == [0.1]
    assert made.training.lr_scheduler_kwargs == {
        "min_lr": 1e-6, "a": "1e-6", "b": -2000.0, "c": 0.5, "d": "e5", "e": [150.0],
    }  # fmt: skip


def test_commas_part_the_names_of_modules(yaml_file):
    for argv in (
        ["--lora_target_modules", "q_proj,v_proj", "k_proj"],
        ["--lora_target_modules", "q_proj, v_proj ,k_proj"],
        ["--config", yaml_file("lora_target_modules: q_proj,v_proj,k_proj\n")],
        ["--config", yaml_file("lora_target_modules: [q_proj, 'v_proj,k_proj']\n")],
    ):
        assert train(*argv).model.lora_target_modules == ["q_proj", "v_proj", "k_proj"]
    assert train("--lora_target_modules", "all").model.lora_target_modules is None

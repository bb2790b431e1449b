"""Every option of our own changes something or is refused: one table, an entry for each option.

Each entry is tried through `fastdpo.train.make_trainer`, the way of the command line, on a tiny
model: a run with the option beside one without it, and what the entry names must differ. An option
that a test elsewhere covers points to that test, which must exist.
"""

import ast
import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from fastdpo import DPOConfig
from fastdpo.modeling.base_weights import host_weights
from fastdpo.modeling.head import unwrap_model
from fastdpo.options import (
    BatchingOptions,
    DataOptions,
    LossOptions,
    ModelOptions,
    ReferenceOptions,
    TokenizationOptions,
    TrlOptions,
)
from fastdpo.trainer.from_options import make_trainer
from tests.cli.test_trl_options import TABLE as TRL_TABLE
from tests.tiny_trainer import CONFIG, TOKENIZER, preference_rows

HERE = Path(__file__).parents[1]
KINDS = (
    ModelOptions, DataOptions, LossOptions, TokenizationOptions, BatchingOptions,
    ReferenceOptions, TrlOptions,
)  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """With `option=value` beside the options `base`, `what` is another than with `base` alone.

    Attributes:
        what: a function of this file that looks at a trainer.
        value: of the option; a str that starts with "@" stands for a file or folder of the test.
        base: options of both runs.
        refused: part of the message, where the value is refused.
    """

    what: str
    value: Any
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    refused: str = ""


def covered(test: str) -> str:
    """A test in another file that shows what the option does."""
    return test


FOLDER = {"dataset_name": "@pairs"}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1}
MIXTURE = {"datasets": [{"path": "@train.jsonl"}, {"path": "@test.jsonl"}]}
STORE = "trainer/test_dpo_trainer.py::test_the_three_options_of_the_reference_store_act"

TABLE: dict[str, Changes | str] = {
    # ModelOptions
    "model_name_or_path": Changes("loaded", "@other"),
    "model_revision": Changes("loaded", "another"),
    "dtype": Changes("loaded", "bfloat16"),
    "trust_remote_code": Changes("loaded", True),
    "qlora": Changes("loaded", True),
    "lora": Changes("adapter", True, {"load_in_4bit": True}),
    "full": Changes("adapter", True),
    "use_peft": Changes("adapter", True, {"load_in_4bit": True}),
    "load_in_4bit": Changes("loaded", True, {"use_peft": True}),
    "lora_r": Changes("adapter", 3),
    "lora_alpha": Changes("adapter", 5),
    "lora_dropout": Changes("adapter", 0.3),
    "lora_target_modules": Changes("adapter", ["q_proj"]),
    "use_rslora": Changes("adapter", True),
    "use_dora": Changes("adapter", True),
    # DataOptions
    "dataset_name": Changes("pairs", "@test.jsonl"),
    "dataset_config": Changes("pairs", "another", FOLDER, refused="another"),
    "dataset_train_split": Changes("pairs", "train[:5]"),
    "dataset_test_split": Changes("pairs", "test[:2]", FOLDER),
    "eval_dataset": Changes("pairs", "@train.jsonl"),
    "max_line_mib": Changes("pairs", 1, {"dataset_name": "@long.jsonl"}, refused="MiB"),
    "columns": Changes("pairs", ["rejected=worse"], {"dataset_name": "@renamed.jsonl"}),
    "rated_pairs": Changes("pairs", "all", {"dataset_name": "@rated.jsonl"}),
    "dataset_streaming": Changes("pairs", True, FOLDER),
    "datasets": Changes("pairs", MIXTURE["datasets"]),
    "test_split_size": Changes("pairs", 3, MIXTURE),
    "mixture_seed": Changes("pairs", 5, MIXTURE | {"test_split_size": 3}),
    # LossOptions
    "beta": Changes("curve", 0.3),
    "loss_type": Changes("curve", ["ipo"]),
    "loss_weights": Changes("curve", [0.5]),
    "label_smoothing": Changes("curve", 0.1),
    "f_divergence_type": Changes("curve", "js_divergence"),
    "f_alpha_divergence_coef": Changes("curve", 0.3, {"f_divergence_type": "alpha_divergence"}),
    "discopop_tau": Changes("curve", 0.5, {"loss_type": ["discopop"]}),
    "simpo_gamma": Changes("curve", 1.0, {"loss_type": ["simpo"]}),
    "ld_alpha": Changes("curve", 0.5),
    "use_weighting": Changes("curve", True),
    "reference_free": Changes("curve", True),
    "router_aux_loss_coef": covered(
        "trainer/test_update.py::test_the_routers_loss_is_over_the_tokens_of_the_whole_update"
    ),
    # TokenizationOptions
    "max_length": Changes("pairs", 24),
    "max_prompt_length": Changes("pairs", 5),
    "max_completion_length": Changes("pairs", 5),
    "truncation_mode": Changes("pairs", "keep_start", {"max_length": 44}),
    "special_tokens_in_content": Changes("pairs", "literal", {"dataset_name": "@spelled.jsonl"}),
    "score_turns": Changes("pairs", "assistant", {"dataset_name": "@turns.jsonl"}),
    "template_date": covered(
        "data/test_template_date.py::test_pairs_have_the_day_of_the_option_and_say_so"
    ),
    "dataset_num_proc": covered(
        "data/test_workers.py::test_pairs_report_and_keys_do_not_depend_on_the_number_of_processes"
    ),
    "data_cache": covered("trainer/test_data_cache.py::test_a_second_trainer_reads_the_pairs"),
    "strict_data": Changes("pairs", True, {"dataset_name": "@useless.jsonl"}, refused="identical"),
    # BatchingOptions
    "micro_batch_tokens": Changes("work", 128),
    "activations": Changes("work", "recompute", {"activations": "keep"}),
    "dequantize": covered(
        "modeling/test_activations.py::test_one_dequantization_serves_recomputation_and_backward"
    ),
    "mlp_tile_tokens": Changes("work", 128),
    "embeddings": Changes("loaded", "host"),
    "base_weights": Changes("loaded", "host"),
    "shared_prefix": Changes("work", "off"),
    "packing": Changes("work", "off"),
    "attention": Changes("curve", "varlen", refused="varlen"),
    "kernels": Changes("work", "fused"),
    "disable_dropout": Changes("loaded", False),
    "nonfinite": covered(
        "trainer/test_dpo_trainer.py::test_a_loss_scaler_skips_an_update_whose_loss_is_not_finite"
    ),
    "model_init_kwargs": Changes("loaded", {"attn_implementation": "eager"}),
    # ReferenceOptions
    "reference": Changes("curve", "@other"),
    "ref_cache": Changes("store", "@elsewhere"),
    "ref_token_logps": covered(STORE),
    "ref_versions": covered(STORE),
    "ref_spot_check": covered(
        "trainer/test_dpo_trainer.py::test_a_second_run_computes_no_reference_and_trains_alike"
    ),
    "first_margin": covered("trainer/test_first_margin.py::test_warn_says_it_and_goes_on"),
    "sync_ref_model": Changes("store", True),
    "ref_model_mixup_alpha": Changes("curve", 0.3, MOVING),
    "ref_model_sync_steps": Changes("curve", 1, {"sync_ref_model": True}),
    # TrlOptions
    "precompute_ref_log_probs": Changes("store", True, {"ref_cache": "off"}, refused="--ref_cache"),
    "padding_free": covered("cli/test_trl_options.py::test_what_is_mapped_arrives"),
    "activation_offloading": covered("cli/test_trl_options.py::test_what_is_mapped_arrives"),
    **dict.fromkeys(
        (name for name, row in TRL_TABLE.items() if row.verdict == "not used"),
        covered("cli/test_trl_options.py::test_what_is_not_used_says_so"),
    ),
}


# What is looked at


def loaded(trainer, calls):
    """The base as it came from the loader, and what the loader was asked for."""
    model = unwrap_model(trainer.policy)
    embedding = model.get_input_embeddings()
    dropouts = {getattr(module, "attention_dropout", None) for module in model.modules()}
    rows = embedding(torch.arange(4)).float().sum().item()
    on_host = host_weights(model) is not None
    return type(embedding), model.dtype, rows, dropouts, len(list(quantized(model))), on_host, calls


def quantized(model):
    return (p for p in model.parameters() if getattr(p, "quant_state", None) is not None)


def adapter(trainer, calls):
    """What is trained, and how it enters."""
    layers = [module for module in trainer.policy.modules() if isinstance(module, LoraLayer)]
    return (
        {n: p.shape for n, p in trainer.policy.named_parameters() if p.requires_grad},
        [dict(layer.scaling) for layer in layers],
        [str(layer.lora_dropout) for layer in layers],
    )


def pairs(trainer, calls):
    """The token ids of both sets."""
    sets = (trainer.train_groups, trainer.eval_groups)
    return [None if groups is None else groups.content_hash for groups in sets]


def curve(trainer, calls):
    """Loss and gradient norm of each update."""
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    return [(line["loss"], line["grad_norm"]) for line in log]


def work(trainer, calls):
    """Shapes that go through the first layer and its MLP."""
    shapes = []
    layer = unwrap_model(trainer.policy).model.layers[0]

    def look(module, arguments):
        shapes.append((type(module).__name__, tuple(arguments[0].shape)))

    layer.register_forward_pre_hook(look)
    layer.mlp.act_fn.register_forward_pre_hook(look)
    trainer.train()
    return shapes


def store(trainer, calls):
    """Where the reference log-probs lie."""
    trainer.train()
    folder = trainer.reference.folder
    return None if folder is None else sorted(path.name for path in folder.parent.rglob("*"))


# The runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data sets."""
    place = tmp_path_factory.mktemp("table")
    for name, seed in (("model", 0), ("other", 1)):
        torch.manual_seed(seed)
        config = CONFIG.__class__(**CONFIG.to_dict() | {"attention_dropout": 0.5})
        AutoModelForCausalLM.from_config(config).save_pretrained(place / name)
        TOKENIZER.save_pretrained(place / name)
    rows = preference_rows(12, seed=3)
    texts = [row["chosen"] for row in rows]
    sets = {
        "pairs/train": rows,
        "pairs/test": preference_rows(4, seed=4),
        "train": rows,
        "test": preference_rows(9, seed=4),
        "long": [row | {"note": "x" * 2**20} for row in rows],
        "renamed": [{"worse" if k == "rejected" else k: v for k, v in r.items()} for r in rows],
        "rated": [
            {"prompt": row["prompt"], "completions": texts[i : i + 3], "ratings": [3, 1, 2]}
            for i, row in enumerate(rows[:8])
        ],
        "spelled": [row | {"prompt": "</s>" + row["prompt"]} for row in rows],
        "turns": [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [
                    {"role": "assistant", "content": row["chosen"]},
                    {"role": "user", "content": "And?"},
                    {"role": "assistant", "content": "That is all."},
                ],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ],
        "useless": [*rows, rows[0] | {"rejected": rows[0]["chosen"]}],
    }
    for name, content in sets.items():
        path = place / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return place


def resolved(value, folder):
    """Without "@": the files and folders of the test."""
    if isinstance(value, list):
        return [resolved(each, folder) for each in value]
    if isinstance(value, dict):
        return {name: resolved(each, folder) for name, each in value.items()}
    is_place = isinstance(value, str) and value.startswith("@")
    return str(folder / value[1:]) if is_place else value


@pytest.fixture
def outcome(folder, tmp_path, monkeypatch):
    """What a trainer made of options shows, or the message with which they are refused."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
    monkeypatch.chdir(tmp_path)
    real, calls = AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(name, **options):
        calls.append({k: v for k, v in options.items() if k != "quantization_config"})
        return real(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)

    def look(what, options):
        calls.clear()
        own = tempfile.mkdtemp(dir=tmp_path) if what == "store" else folder / "cache"
        monkeypatch.setenv("FASTDPO_CACHE", str(own))
        default = {
            "model_name_or_path": str(folder / "model"), "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2,
            "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
            "activation_checkpointing": False,
        }  # fmt: skip
        if "datasets" not in options:
            default["dataset_name"] = str(folder / "train.jsonl")
        values = default | resolved(options, folder)
        try:
            model, data, config = (
                kind(
                    **{e.name: values[e.name] for e in dataclasses.fields(kind) if e.name in values}
                )
                for kind in (ModelOptions, DataOptions, DPOConfig)
            )
            return globals()[what](make_trainer(model, data, config), list(calls))
        except (ValueError, FloatingPointError) as error:
            return f"refused: {error}"

    return look


TRIED = [name for name, entry in TABLE.items() if isinstance(entry, Changes)]


@pytest.fixture(scope="module")
def without():
    """What was seen without an option; many have the same."""
    return {}


@pytest.mark.parametrize("name", TRIED)
def test_an_option_changes_something_or_is_refused(outcome, without, name):
    entry = TABLE[name]
    key = entry.what, str(entry.base)
    if key not in without:
        without[key] = outcome(entry.what, entry.base)
    before = without[key]
    after = outcome(entry.what, entry.base | {name: entry.value})
    assert str(after).startswith("refused") == bool(entry.refused), after
    assert entry.refused in str(after)
    assert after != before, f"--{name} {entry.value} changes nothing"


@pytest.mark.parametrize("what", ["loaded", "adapter", "pairs", "curve", "work"])
def test_two_runs_of_the_same_options_show_the_same(outcome, what):
    """Else every entry of the table would pass."""
    assert outcome(what, {}) == outcome(what, {})


def test_every_option_has_an_entry():
    ours = [entry.name for kind in KINDS for entry in dataclasses.fields(kind)]
    missing = set(ours) - TABLE.keys()
    assert not missing, f"say in TABLE how it shows that {sorted(missing)} act"
    inherited = {name for name, row in TRL_TABLE.items() if row.verdict == "not used"}
    assert set(TABLE) - set(ours) <= inherited, "an option of the table is gone"


def test_the_tests_that_entries_name_exist():
    named = {entry for entry in TABLE.values() if isinstance(entry, str)}
    assert len(named) >= 4
    for entry in named:
        file, function = entry.split("::")
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{entry} is gone"

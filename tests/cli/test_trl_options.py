"""Every option of trl.DPOConfig 1.16: the same here, mapped, not used (and said so), or refused.

The table is data; `as_markdown` renders it for docs/coming-from-trl.md, which must hold it as it
is where that file exists.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from fastdpo import DPOConfig

DOCS = Path(__file__).parents[2] / "docs" / "coming-from-trl.md"
UNSAID = object()


@dataclass(frozen=True)
class Row:
    """What becomes of one option.

    Attributes:
        verdict: same, mapped, not used, refused.
        told: for people; of what is not used or refused a part of the message itself.
        value: another value than the default, to try.
        becomes: for mapped ones: the options that follow from it.
    """

    verdict: str
    told: str = ""
    value: Any = UNSAID
    becomes: dict[str, Any] = dataclasses.field(default_factory=dict)


def unused(told: str, value: Any) -> Row:
    return Row("not used", told, value)


def refused(told: str, value: Any) -> Row:
    return Row("refused", told, value)


_NO_LOGITS = "evaluation adds up log-probs and builds no logits"
_MEMORY = "pairs lie in memory as token ids"
_SUMS = "the ranks sum up their gradients themselves"
_FIRST = "the first rank alone prints and saves"
_WHOLE = "every GPU holds the whole model"

TABLE: dict[str, Row] = {
    # TRL's own
    **dict.fromkeys(
        (
            "model_init_kwargs",
            "trust_remote_code",
            "disable_dropout",
            "beta",
            "discopop_tau",
            "loss_weights",
            "f_alpha_divergence_coef",
            "use_weighting",
            "learning_rate",
            "gradient_checkpointing",
            "logging_steps",
            "lr_scheduler_kwargs",
        ),
        Row("same"),
    ),
    "router_aux_loss_coef": Row("same", "0 leaves it out", 0.01),
    "max_length": Row("same", "at least 2; max_prompt_length and max_completion_length exist too"),
    "truncation_mode": Row(
        "same", "by default keep_completion, which cuts the prompt first; keep_end is refused"
    ),
    "loss_type": Row("same", "and simpo, orpo, rso"),
    "ld_alpha": Row("same", "", 0.5),
    "f_divergence_type": Row("same", "", "js_divergence"),
    "label_smoothing": Row("same", "also for sigmoid (cDPO), where TRL ignores it", 0.1),
    "bf16": Row("same", "by default on where CUDA has it, off elsewhere"),
    "sync_ref_model": Row("same", "with adapters too", True),
    "ref_model_mixup_alpha": Row("same", "refused without sync_ref_model"),
    "ref_model_sync_steps": Row("same", "refused without sync_ref_model"),
    "per_device_train_batch_size": Row(
        "same", "times gradient_accumulation_steps: the pairs of an update of all GPUs together"
    ),
    "ddp_backend": Row("same", "nccl on GPUs, gloo on CPUs"),
    "ddp_timeout": Row("same", "seconds to wait for a rank that does not answer"),
    "precompute_ref_log_probs": Row(
        "mapped", "what happens anyway: ref_cache stores and reuses them", True, {"ref_cache": None}
    ),
    "padding_free": Row("mapped", "what happens anyway", True, {"padding_free": True}),
    "activation_offloading": Row("mapped", "activations offload", True, {"activations": "offload"}),
    "precompute_ref_batch_size": unused("micro_batch_tokens bounds the reference pass too", 4),
    "pad_to_multiple_of": unused("nothing is padded", 8),
    "pad_token": unused("set tokenizer.pad_token", "<pad>"),
    "dataset_num_proc": Row(
        "same", "by default all cores but one; large sets alone start processes", 4
    ),
    "use_liger_kernel": refused("the fused log-probs are already here", True),
    # transformers'
    **dict.fromkeys(
        (
            "output_dir",
            "num_train_epochs",
            "max_steps",
            "lr_scheduler_type",
            "warmup_steps",
            "optim",
            "optim_args",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "optim_target_modules",
            "gradient_accumulation_steps",
            "max_grad_norm",
            "fp16",
            "tf32",
            "activation_checkpointing",
            "activation_checkpointing_kwargs",
            "gradient_checkpointing_kwargs",
            "logging_strategy",
            "logging_first_step",
            "include_num_input_tokens_seen",
            "log_level",
            "disable_tqdm",
            "report_to",
            "run_name",
            "project",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "save_only_model",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "restore_callback_states_from_checkpoint",
            "full_determinism",
            "seed",
            "data_seed",
            "use_cpu",
            "accelerator_config",
            "dataloader_drop_last",
            "dataloader_pin_memory",
            "skip_memory_metrics",
            "do_train",
            "do_eval",
            "do_predict",
            "resume_from_checkpoint",
        ),
        Row("same"),
    ),
    "debug": Row("same", "tpu_metrics_debug is refused"),
    "train_sampling_strategy": Row("same", "random or sequential; group_by_length is refused"),
    "remove_unused_columns": Row("same", "off; True is refused"),
    "logging_nan_inf_filter": Row("same", "off; True is refused"),
    "per_device_eval_batch_size": unused("micro_batch_tokens bounds a micro-batch", 2),
    "bf16_full_eval": unused("evaluation has the precision of training", True),
    "fp16_full_eval": unused("evaluation has the precision of training", True),
    "torch_empty_cache_steps": unused("the allocator's cache holds", 5),
    "use_cache": unused("nothing is generated", True),
    "liger_kernel_config": unused("no Liger kernel", {"rope": True}),
    "label_names": unused("pairs have no labels", ["labels"]),
    "length_column_name": unused("lengths are counted in tokens", "size"),
    "dataloader_num_workers": unused(_MEMORY, 2),
    "dataloader_persistent_workers": unused(_MEMORY, True),
    "dataloader_prefetch_factor": unused(_MEMORY, UNSAID),
    "dataloader_multiprocessing_context": unused(_MEMORY, "spawn"),
    "dataloader_in_order": unused(_MEMORY, False),
    "prediction_loss_only": unused(_NO_LOGITS, True),
    "eval_accumulation_steps": unused(_NO_LOGITS, 3),
    "eval_do_concat_batches": unused(_NO_LOGITS, False),
    "eval_use_gather_object": unused(_NO_LOGITS, True),
    "include_for_metrics": unused(_NO_LOGITS, ["loss"]),
    "batch_eval_metrics": unused(_NO_LOGITS, True),
    "average_tokens_across_devices": unused("a loss is always that of the whole update", False),
    "ddp_find_unused_parameters": unused(_SUMS, True),
    "ddp_bucket_cap_mb": unused(_SUMS, 25),
    "ddp_broadcast_buffers": unused(_SUMS, True),
    "ddp_static_graph": unused(_SUMS, True),
    "fsdp_config": unused("--fsdp is not built", UNSAID),
    "local_rank": unused("the launcher says it", UNSAID),
    "log_on_each_node": unused(_FIRST, False),
    "log_level_replica": unused(_FIRST, "info"),
    "save_on_each_node": unused(_FIRST, True),
    "auto_find_batch_size": refused("the update would depend on the GPU", True),
    "deepspeed": refused(_WHOLE, {"zero_optimization": {}}),
    "fsdp": refused(_WHOLE, "full_shard"),
    "parallelism_config": refused(_WHOLE, {"tp_size": 2}),
    "label_smoothing_factor": refused("which DPO does not have", 0.1),
    "torch_compile": refused("it compiles model.forward, which is never called", True),
    "torch_compile_backend": refused("it turns --torch_compile on", "inductor"),
    "torch_compile_mode": refused("it turns --torch_compile on", "default"),
    "neftune_noise_alpha": refused("noise in the embeddings", 5.0),
    "ignore_data_skip": refused("would see pairs twice and others never", True),
    "enable_jit_checkpoint": refused("SIGTERM writes a checkpoint", True),
}


def as_markdown() -> str:
    """The table as docs/coming-from-trl.md has it; what is plainly the same is one row."""
    names = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    same = [name for name, row in TABLE.items() if row == Row("same")]
    lines = ["| Option of trl.DPOConfig | Here | |", "|---|---|---|"]
    lines += [
        f"| {name} | {row.verdict} | {row.told} |"
        for name, row in TABLE.items()
        if name not in same
    ]
    for whose, chosen in (
        ("TRL's own", [name for name in same if name not in names]),
        ("inherited from transformers", [name for name in same if name in names]),
    ):
        lines.append(f"| {', '.join(chosen)} | same | {whose} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def theirs():
    trl = pytest.importorskip("trl", reason="the options are those of trl (fastdpo[dev])")
    return {entry.name: entry for entry in dataclasses.fields(trl.DPOConfig)}


@pytest.fixture
def config(tmp_path):
    return lambda **options: DPOConfig(str(tmp_path), use_cpu=True, **options)


def test_every_option_of_trl_has_a_row(theirs):
    missing = theirs.keys() - TABLE.keys()
    assert not missing, f"decide what becomes of {sorted(missing)}"
    ours = {entry.name for entry in dataclasses.fields(DPOConfig)}
    assert theirs.keys() <= ours


def test_what_is_the_same_takes_trls_default_without_a_word(theirs, config, caplog, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, row in TABLE.items():
        if row.verdict != "same" or name not in theirs:
            continue
        entry = theirs[name]
        given = entry.default if entry.default is not dataclasses.MISSING else ["sigmoid"]
        if name in ("output_dir", "use_cpu", "remove_unused_columns", "logging_nan_inf_filter"):
            continue  # given above, or another default: the table says so
        made = config(**{name: given if row.value is UNSAID else row.value})
        if row.value is not UNSAID:
            assert getattr(made, name) == row.value
    assert "changes nothing" not in caplog.text


@pytest.mark.parametrize("name", [n for n, row in TABLE.items() if row.verdict == "mapped"])
def test_what_is_mapped_arrives(config, caplog, name):
    row = TABLE[name]
    made = config(**{name: row.value})
    for option, value in row.becomes.items():
        assert getattr(made, option) == value
    assert "changes nothing" not in caplog.text


def test_what_is_not_used_says_so(config, caplog):
    for name, row in TABLE.items():
        if row.verdict == "not used" and row.value is not UNSAID:
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="fastdpo"):
                config(**{name: row.value})
            told = [record.getMessage() for record in caplog.records]
            assert len(told) == 1, (name, told)
            assert told[0].startswith(f"--{name} changes nothing: ")
            assert row.told in told[0]


def test_what_is_refused_is_refused_by_name(config):
    for name, row in TABLE.items():
        if row.verdict == "refused":
            with pytest.raises(ValueError, match=f"--{name} ") as told:
                config(**{name: row.value})
            assert row.told in str(told.value), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"truncation_mode": "keep_end"}, "--truncation_mode .* use keep_completion"),
        ({"activation_offloading": True, "activations": "keep"}, "--activations keep contradict"),
        ({"precompute_ref_log_probs": True, "ref_cache": "off"}, "--ref_cache off for none"),
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "--sync_ref_model True"),
        ({"precompute_ref_log_probs": True, "reference_free": True}, "--reference_free True"),
        ({"pad_to_multiple_of": "eight"}, "--pad_to_multiple_of is 'eight'"),
        ({"dataset_num_proc": 0}, "--dataset_num_proc is 0"),
        ({"precompute_ref_batch_size": -1}, "--precompute_ref_batch_size is -1"),
        ({"router_aux_loss_coef": -1.0}, "--router_aux_loss_coef is -1.0"),
    ],
)
def test_wrong_values_of_trls_names(config, options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_a_padding_that_the_command_line_gives_as_text(config):
    assert config().pad_to_multiple_of is None
    assert config(pad_to_multiple_of="none").pad_to_multiple_of is None
    assert config(pad_to_multiple_of="8").pad_to_multiple_of == 8


def test_the_docs_hold_the_table():
    table = as_markdown()
    assert len(table.splitlines()) > 40
    if not DOCS.exists():
        pytest.skip("docs/coming-from-trl.md is not written yet; as_markdown() renders its table")
    assert table in DOCS.read_text(encoding="utf-8"), f"put this into {DOCS}:\n{table}"

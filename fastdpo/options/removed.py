"""Options that users of TRL, transformers and LLaMA-Factory still pass, and what to do instead.

Each one gets one sentence of advice. Only the standard library is imported.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from fastdpo.options.synonyms import FOREIGN_OPTIONS, SYNONYMS

_NAMED_REFERENCE = (
    "use reference with adapter, base, or the folder or hub id of a model or adapter."
)
_NO_PADDING = "nothing is padded; leave it out."

REMOVED_OPTIONS = {
    # TRL, former releases
    "max_target_length": "use max_completion_length.",
    **dict.fromkeys(
        ("rpo_alpha", "pref_ftx"),
        "use loss_type sigmoid sft with loss_weights 1.0 and the value that you gave.",
    ),
    "generate_during_eval": "generate after training from the saved adapter, or in a callback.",
    "model_adapter_name": "the active adapter is trained: model.set_adapter(NAME), and leave it "
    "out.",
    "ref_adapter_name": "use reference with the adapter's name; one that is called reference is "
    "found by itself.",
    "force_use_ref_model": _NAMED_REFERENCE,
    "ref_model_init_kwargs": "a reference is loaded as the policy is; use model_init_kwargs.",
    "base_model_attribute_name": "the backbone is found by itself; leave it out.",
    **dict.fromkeys(("label_pad_token_id", "padding_value"), _NO_PADDING),
    "is_encoder_decoder": "only decoder models can be trained.",
    "tools": "put a tools column into the dataset.",
    **dict.fromkeys(
        ("use_logits_to_keep", "use_num_logits_to_keep"), "logits are never built; leave it out."
    ),
    "use_liger_loss": "the log-probs are always fused; leave it out.",
    "merge_prompts": "pairs that share a completion are computed together by themselves; leave it "
    "out.",
    "ignore_bias_buffers": "it served distributed runs; leave it out.",
    # TRL's ModelConfig and LLaMA-Factory
    "load_in_8bit": "8-bit weights are not built; use --qlora.",
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"),
        "--qlora is NF4 with its scales quantized too; leave it out.",
    ),
    "attn_implementation": "attention over packed pairs is fastdpo's own; leave it out.",
    "torch_dtype": "use dtype.",
    "lora_task_type": "it is always causal language modelling; leave it out.",
    "lora_modules_to_save": "training whole layers beside the adapter is not built; use --full.",
    "lora_target_parameters": "adapters sit on linear layers; use lora_target_modules.",
    "pref_beta": "use beta.",
    "pref_loss": "use loss_type.",
    "pref_bco_weight": "use loss_type sigmoid bco_pair with loss_weights.",
    "nll_loss_coef": "use loss_type sigmoid sft with loss_weights 1.0 and the value that you gave.",
    "cutoff_len": "use max_length.",
    # The alignment handbook
    **dict.fromkeys(
        ("dataset_mixer", "dataset_splits", "dataset_configs"),
        "use dataset_name, dataset_train_split and dataset_test_split, or datasets with a path, a "
        "split and a fraction each.",
    ),
    "preprocessing_num_workers": "pairs are tokenised in one process; leave it out.",
    "use_flash_attention_2": "attention over packed pairs is fastdpo's own; leave it out.",
    "chat_template": "set it in the tokenizer's folder or as tokenizer.chat_template.",
    # transformers, former releases
    "warmup_ratio": "use warmup_steps with a value below 1.",
    "evaluation_strategy": "use eval_strategy.",
    "group_by_length": "pairs are packed by tokens and nothing is padded; leave it out.",
    "include_tokens_per_second": "perf/tokens_per_second is always logged; leave it out.",
    "overwrite_output_dir": "use another output_dir, or resume_from_checkpoint.",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR.",
    "save_safetensors": "safetensors is all there is; leave it out.",
    "no_cuda": "use use_cpu.",
    "no_remove_unused_columns": "columns are never removed; leave it out.",
    "no_gradient_checkpointing": "use gradient_checkpointing false.",
    "tpu_num_cores": "fastdpo runs on one CUDA GPU or the CPU; leave it out.",
}


_NO_CANDIDATES = ("do_train", "do_eval", "do_predict")
"""Options of transformers that nobody means who mistypes another one."""

RENAMED_VALUES = {"embeddings": {"card": "gpu"}}
"""By option, the former names of its values, which YAML files and command lines may still have."""


def present_value(name: str, value: Any) -> Any:
    """The value of an option under its present name; any other value as it is."""
    return RENAMED_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def suggest_option(name: str, known: Iterable[str], dashes: str = "") -> str:
    """Say what to do about an unknown option.

    Args:
        name: as the user wrote it, without dashes.
        known: the options that there are.
        dashes: what stands before an option where it was written.

    Returns:
        Advice if the option once existed, the option of the same meaning if another trainer has
        it under this name, else the nearest name.
    """
    options = [option for option in known if option not in _NO_CANDIDATES]
    if name in REMOVED_OPTIONS:
        return REMOVED_OPTIONS[name]
    if (same := SYNONYMS.get(name)) is not None:
        if same in options:
            return f"it is {dashes}{same} here."
        if same.startswith("lora"):
            return f"it is {same} of the commands, and belongs into peft_config here."
        return f"it is {same} in training, and this takes no such option: leave it out."
    if name in FOREIGN_OPTIONS:
        return FOREIGN_OPTIONS[name]
    nearest = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"the nearest is {dashes}{nearest[0]}" if nearest else "no option has a name like it"

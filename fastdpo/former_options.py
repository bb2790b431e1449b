"""Options that users of TRL, transformers and LLaMA-Factory still pass, and what to do instead.

Each one gets one sentence of advice. Only the standard library is imported.
"""

import difflib
from collections.abc import Iterable

_NOT_BUILT = "is not built; leave it out."
_ONE_REFERENCE = "the reference is the model with its adapter off; leave it out."
_NO_PADDING = "nothing is padded; leave it out."

REMOVED_OPTIONS = {
    # TRL, former releases
    "max_prompt_length": "use max_length: the completion is kept and the prompt cut from the left.",
    **dict.fromkeys(
        ("max_completion_length", "max_target_length"),
        "use max_length, the limit of prompt + completion.",
    ),
    **dict.fromkeys(("rpo_alpha", "pref_ftx"), f"the added SFT term {_NOT_BUILT}"),
    "reference_free": "a loss without a reference is not DPO and is not built.",
    "generate_during_eval": "generate after training from the saved adapter, or in a callback.",
    **dict.fromkeys(
        ("model_adapter_name", "ref_adapter_name", "force_use_ref_model"), _ONE_REFERENCE
    ),
    "ref_model_init_kwargs": "the reference shares the policy's weights; use model_init_kwargs.",
    "base_model_attribute_name": "the backbone is found by itself; leave it out.",
    **dict.fromkeys(("label_pad_token_id", "padding_value", "pad_token"), _NO_PADDING),
    "is_encoder_decoder": "only decoder models can be trained.",
    "tools": "put a tools column into the dataset.",
    **dict.fromkeys(
        ("use_logits_to_keep", "use_num_logits_to_keep"), "logits are never built; leave it out."
    ),
    "use_liger_loss": "the log-probs are always fused; leave it out.",
    # TRL 1.16
    "padding_free": "pairs are always packed without padding; leave it out.",
    "pad_to_multiple_of": "micro-batches choose their length; use micro_batch_tokens.",
    "precompute_ref_log_probs": "use ref_cache: the reference is stored and reused by default.",
    "precompute_ref_batch_size": "micro_batch_tokens sizes the reference pass; leave it out.",
    "activation_offloading": "use activation_checkpointing_kwargs with offload.",
    "dataset_num_proc": "pairs are tokenised in one process; leave it out.",
    "dataset_streaming": "pairs are read whole, to pack them and to know the run's length.",
    "ignore_bias_buffers": "it served distributed runs; leave it out.",
    "loss_weights": f"a sum of losses {_NOT_BUILT}",
    "label_smoothing": f"a loss with label smoothing {_NOT_BUILT}",
    "ld_alpha": f"LD-DPO {_NOT_BUILT}",
    "use_weighting": f"WPO's weighting {_NOT_BUILT}",
    "discopop_tau": f"the discopop loss {_NOT_BUILT}",
    "router_aux_loss_coef": f"the auxiliary loss of mixtures of experts {_NOT_BUILT}",
    **dict.fromkeys(
        ("f_divergence_type", "f_alpha_divergence_coef"),
        f"a divergence other than the reverse KL of DPO {_NOT_BUILT}",
    ),
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        f"a reference that moves {_NOT_BUILT}",
    ),
    # TRL's ModelConfig and LLaMA-Factory
    "use_peft": "use --lora or --qlora.",
    "load_in_4bit": "use --qlora.",
    "load_in_8bit": "8-bit weights are not built; use --qlora.",
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"),
        "--qlora is NF4 with its scales quantized too; leave it out.",
    ),
    "attn_implementation": "attention over packed pairs is fastdpo's own; leave it out.",
    "torch_dtype": "use dtype.",
    "use_dora": "DoRA is not built; use plain --lora.",
    "use_rslora": "rank-stabilized LoRA is not built; set lora_alpha.",
    "lora_task_type": "it is always causal language modelling; leave it out.",
    "lora_modules_to_save": "training whole layers beside the adapter is not built; use --full.",
    "lora_target_parameters": "adapters sit on linear layers; use lora_target_modules.",
    "pref_beta": "use beta.",
    "pref_loss": "use loss_type.",
    "cutoff_len": "use max_length.",
    # transformers, former releases
    "warmup_ratio": "use warmup_steps with a value below 1.",
    "evaluation_strategy": "use eval_strategy.",
    "group_by_length": "rows are packed by tokens and nothing is padded; leave it out.",
    "include_tokens_per_second": "perf/tokens_per_second is always logged; leave it out.",
    "overwrite_output_dir": "use another output_dir, or resume_from_checkpoint.",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR.",
    "save_safetensors": "safetensors is all there is; leave it out.",
    "no_cuda": "use use_cpu.",
    "tpu_num_cores": "fastdpo runs on one CUDA card or the CPU; leave it out.",
}


def explain_unknown(name: str, known: Iterable[str], dashes: str = "") -> str:
    """What to do about an option that does not exist: advice if it once did, else the nearest."""
    if name in REMOVED_OPTIONS:
        return REMOVED_OPTIONS[name]
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"the nearest is {dashes}{nearest[0]}" if nearest else "no option has a name like it"

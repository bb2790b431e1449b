"""Our options under the names of axolotl, LLaMA-Factory, Unsloth and everyday speech.

Each name has the option that means the same, or one sentence of advice where none does.
"""

_OPTION_OF = {
    "model_name_or_path": (
        "base_model", "model_name", "model_path", "model_id", "pretrained_model",
        "pretrained_model_name_or_path", "policy", "checkpoint_path", "adapter_name_or_path",
        "lora_model_dir",
    ),
    "model_revision": ("revision", "base_model_revision", "revision_of_model"),
    "dtype": ("precision", "infer_dtype", "model_dtype"),
    "lora_r": ("lora_rank", "rank", "r", "lora_dim", "peft_lora_r"),
    "lora_alpha": ("alpha", "peft_lora_alpha"),
    "lora_dropout": ("peft_lora_dropout",),
    "lora_target_modules": (
        "lora_target", "lora_targets", "lora_modules", "target_modules", "modules",
    ),
    "use_rslora": ("peft_use_rslora", "rslora"),
    "use_dora": ("peft_use_dora", "dora"),
    "qlora": ("use_qlora", "load_4bit", "use_4bit", "in_4bit", "four_bit"),
    "lora": ("use_lora", "peft"),
    "full": ("full_finetuning", "full_finetune", "full_tuning"),
    "dataset_name": (
        "data", "data_path", "dataset_path", "data_file", "data_files", "train_file",
        "train_data", "train_dataset", "dataset_name_or_path", "train_files", "train",
    ),
    "dataset_config": ("dataset_config_name", "subset"),
    "dataset_train_split": ("train_split", "split", "dataset_split"),
    "dataset_test_split": ("test_split", "eval_split", "validation_split"),
    "eval_dataset": (
        "eval_file", "eval_data", "eval_data_path", "eval_dataset_name", "validation_file",
        "validation_data", "val_data", "val_file", "val_dataset", "test_file", "test_data",
        "test_dataset", "test_datasets",
    ),
    "output_dir": ("output", "out", "output_path", "save_dir", "out_dir", "output_folder"),
    "learning_rate": ("lr", "peak_lr", "max_lr", "initial_lr", "policy_lr"),
    "lr_scheduler_type": ("lr_scheduler", "scheduler", "lr_schedule", "scheduler_type"),
    "warmup_steps": ("warmup", "num_warmup_steps", "lr_warmup_steps", "warmup_updates"),
    "num_train_epochs": ("epochs", "epoch", "num_epochs", "n_epochs", "train_epochs"),
    "max_steps": (
        "steps", "num_steps", "train_steps", "total_steps", "max_train_steps",
        "num_train_steps", "max_iters", "iters", "max_updates",
    ),
    "per_device_train_batch_size": (
        "batch_size", "train_batch_size", "per_device_batch_size", "bs", "bsz",
        "micro_batch_size", "per_gpu_train_batch_size", "global_batch_size",
    ),
    "gradient_accumulation_steps": (
        "grad_accum", "grad_accum_steps", "gradient_accumulation", "accumulation_steps",
        "accumulate_grad_batches", "grad_acc", "grad_acc_steps",
    ),
    "max_grad_norm": (
        "clip", "clip_grad", "grad_clip", "gradient_clipping", "gradient_clip_val", "clip_norm",
        "grad_norm",
    ),
    "weight_decay": ("wd", "decay"),
    "adam_beta1": ("beta1",),
    "adam_beta2": ("beta2",),
    "adam_epsilon": ("eps", "epsilon", "adam_eps"),
    "optim": ("optimizer", "optimiser", "optim_name"),
    "seed": ("random_state", "random_seed"),
    "logging_steps": ("log_every", "log_steps", "log_interval", "logging_interval"),
    "eval_steps": ("eval_every", "eval_interval", "evaluation_steps"),
    "save_steps": ("save_every", "save_interval", "checkpoint_steps", "checkpoint_interval"),
    "report_to": ("tracker", "trackers", "log_with", "logger"),
    "run_name": ("wandb_name", "wandb_run_name", "wandb_run_id", "experiment_name"),
    "resume_from_checkpoint": ("resume", "resume_from", "auto_resume_from_checkpoints"),
    "max_length": (
        "sequence_len", "sequence_length", "seq_len", "seq_length", "max_seq_length",
        "max_seq_len", "max_len", "context_length", "ctx_len", "model_max_length", "block_size",
        "max_tokens",
    ),
    "max_completion_length": ("max_response_length", "max_new_length"),
    "beta": ("dpo_beta", "rl_beta", "kl_beta", "kl_coef", "orpo_alpha"),
    "loss_type": ("loss", "dpo_loss", "dpo_loss_type", "loss_fn", "preference_loss"),
    "loss_weights": ("loss_weight",),
    "label_smoothing": ("dpo_label_smoothing", "cdpo_label_smoothing", "smoothing"),
    "simpo_gamma": ("gamma", "simpo_margin", "gamma_beta_ratio"),
    "use_weighting": ("dpo_use_weighting", "wpo"),
    "reference": ("ref_model", "ref_model_name_or_path", "ref_model_adapters", "reference_model"),
    "ref_cache": ("reference_cache", "ref_cache_dir"),
    "micro_batch_tokens": ("max_tokens_per_batch", "tokens_per_batch"),
    "activation_checkpointing": (
        "use_gradient_checkpointing", "grad_checkpointing", "gradient_checkpoint",
    ),
    "dataset_streaming": ("stream",),
    "strict_data": ("strict",),
    "early_stopping_patience": ("early_stopping_steps", "early_stopping", "early_stop"),
    "per_device_eval_batch_size": ("eval_batch_size", "val_batch_size"),
    "adapter": ("adapter_path", "adapter_dir", "peft_model", "peft_model_id", "lora_path"),
}  # fmt: skip

SYNONYMS = {name: option for option, names in _OPTION_OF.items() for name in names}
"""Another trainer's name -> our option."""

_LAUNCHER = "the launcher decides it: torchrun --nproc_per_node NUMBER -m fastdpo.train ..."
_OWN_KERNELS = "attention and log-probs are fastdpo's own; leave it out."
_TEMPLATE = "the tokenizer's own chat template is used; set it in the tokenizer's folder."
_PACKED = "completions are always packed, whatever is given; leave it out."
_WANDB = "set the tracker's own environment variable (WANDB_PROJECT ...)."
_COMPLETIONS = "the loss is over the completions alone, as DPO is; leave it out."
_PREPARED = "nothing is prepared beforehand; leave it out."
_PLAIN_LORA = "adapters are plain LoRA, rsLoRA or DoRA; leave it out."
_HELD_OUT = (
    "hold pairs out by a slice (dataset_train_split train[100:], dataset_test_split train[:100]), "
    "or name them in eval_dataset."
)

FOREIGN_OPTIONS = {
    # LLaMA-Factory
    "stage": "preferences are all that is trained; leave it out, and choose with loss_type.",
    "finetuning_type": "use one of qlora, lora and full.",
    "template": _TEMPLATE,
    "dataset_dir": "name the file itself in dataset_name.",
    "max_samples": "use a slice, such as dataset_train_split train[:1000].",
    "val_size": _HELD_OUT,
    "quantization_bit": "4 bits are what is built: use qlora.",
    **dict.fromkeys(("quantization_method", "double_quantization"), "qlora is NF4; leave it out."),
    **dict.fromkeys(("quantization_type", "quantization"), "qlora is NF4; leave it out."),
    "ref_model_quantization_bit": "a reference is loaded as the policy is; leave it out.",
    "additional_target": "training whole layers beside the adapter is not built; use full.",
    "freeze_trainable_layers": "use lora, qlora or full.",
    "template_dir": _TEMPLATE,
    "compute_type": "use bf16 or fp16.",
    "trainable_layers": "use lora, qlora or full.",
    "use_swanlab": "use report_to.",
    **dict.fromkeys(("use_unsloth", "flash_attn", "enable_liger_kernel"), _OWN_KERNELS),
    **dict.fromkeys(("plot_loss",), "metrics.jsonl in output_dir holds the curve; leave it out."),
    **dict.fromkeys(("overwrite_cache", "tokenized_path"), _PREPARED),
    **dict.fromkeys(("train_on_prompt", "mask_history"), _COMPLETIONS),
    **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini"), "use optim."),
    **dict.fromkeys(("pissa_init", "loraplus_lr_ratio", "create_new_adapter"), _PLAIN_LORA),
    "neat_packing": _PACKED,
    "dpo_label_smoothing_factor": "use label_smoothing.",
    "upcast_layernorm": "norms follow dtype; leave it out.",
    "mix_strategy": "use datasets with a path and a fraction each, in a YAML file.",
    # axolotl
    "rl": "preferences are all that is trained; leave it out, and choose with loss_type.",
    "adapter": "use lora or qlora; to train an adapter on, name its folder as the model.",
    **dict.fromkeys(("val_set_size", "test_size", "eval_size", "val_ratio"), _HELD_OUT),
    **dict.fromkeys(("eval_ratio", "split_dataset_ratio"), _HELD_OUT),
    **dict.fromkeys(
        ("min_lr", "cosine_min_lr_ratio"),
        "use lr_scheduler_type cosine_with_min_lr, with min_lr in lr_scheduler_kwargs.",
    ),
    **dict.fromkeys(("dataset_prepared_path", "dataset_processes"), _PREPARED),
    **dict.fromkeys(("sample_packing", "eval_sample_packing", "pad_to_sequence_len"), _PACKED),
    "lora_target_linear": "every linear layer is what lora_target_modules means unset.",
    **dict.fromkeys(("lora_fan_in_fan_out", "peft_init_lora_weights"), _PLAIN_LORA),
    **dict.fromkeys(("model_type", "is_llama_derived_model"), "the config says it; leave it out."),
    **dict.fromkeys(("tokenizer_type", "tokenizer_use_fast"), "the tokenizer's folder says it."),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_name", "tokenizer_name_or_path", "tokenizer_config"),
        "the tokenizer is the one in the model's folder: put it there.",
    ),
    "train_on_inputs": _COMPLETIONS,
    **dict.fromkeys(
        ("flash_attention", "xformers_attention", "sdp_attention", "flex_attention"), _OWN_KERNELS
    ),
    "plugins": _OWN_KERNELS,
    "special_tokens": "set them in the tokenizer's folder.",
    **dict.fromkeys(("evals_per_epoch", "eval_per_epoch"), "use eval_steps, below 1 a share."),
    "saves_per_epoch": "use save_steps, below 1 a share of the run.",
    **dict.fromkeys(("wandb_project", "wandb_entity", "wandb_watch", "wandb_log_model"), _WANDB),
    "mlflow_tracking_uri": _WANDB,
    # ms-swift
    **dict.fromkeys(("train_type", "tuner_type", "sft_type"), "use one of qlora, lora and full."),
    "rlhf_type": "preferences are all that is trained; leave it out, and choose with loss_type.",
    "quant_bits": "4 bits are what is built: use qlora.",
    "quant_method": "qlora is NF4; leave it out.",
    "lazy_tokenize": _PREPARED,
    # Unsloth and PEFT
    **dict.fromkeys(
        ("fast_inference", "gpu_memory_utilization", "max_lora_rank"),
        "nothing is generated in training; leave it out.",
    ),
    "bnb_4bit_compute_dtype": "products have the dtype of the model; use dtype.",
    "dataset_text_field": "the columns are recognized; use columns where they are not.",
    **dict.fromkeys(("bias", "lora_bias"), "adapters train no bias; leave it out."),
    **dict.fromkeys(("loftq_config", "init_lora_weights", "lora_init"), _PLAIN_LORA),
    "device_map": "the GPU is used if there is one; leave it out.",
    **dict.fromkeys(("gpus", "num_gpus", "num_processes", "world_size", "devices"), _LAUNCHER),
    **dict.fromkeys(("fp32", "float32"), "use dtype float32."),
    **dict.fromkeys(("use_8bit", "load_8bit"), "8-bit weights are not built; use qlora."),
    "bits": "4 bits are what is built: use qlora.",
}
"""Names of other trainers that no option of ours means, with one sentence of advice each."""

"""`DPOConfig`: the training arguments of one run, TRL's defaults, and what cannot work refused."""

import logging
import os
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

import torch
from transformers import TrainingArguments

from fastdpo.options import PreferenceOptions, TrlOptions
from fastdpo.options.checks import check_finite, check_keys, check_printable, option
from fastdpo.options.removed import suggest_option
from fastdpo.options.running import INHERITED_CHECKS
from fastdpo.system import ranks
from fastdpo.system.device import cuda_has_bf16

logger = logging.getLogger(__name__)

_WHOLE_MODEL = (
    "every GPU holds the whole model, and the ranks share the pairs of an update: leave it out; "
    "where the model is larger than a GPU, train an adapter over 4-bit weights (--qlora)"
)

# name, the values that mean "not requested", and why anything else is refused.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "auto_find_batch_size",
        (False,),
        "the update would depend on the GPU; bound the memory with --micro_batch_tokens instead",
    ),
    ("deepspeed", (None, ""), _WHOLE_MODEL),
    ("fsdp", (None, "", False, []), _WHOLE_MODEL),
    ("parallelism_config", (None,), _WHOLE_MODEL),
    (
        "label_smoothing_factor",
        (0,),
        "it smooths the labels of a cross entropy, which DPO does not have; leave it out",
    ),
    (
        "torch_compile",
        (False,),
        "it compiles model.forward, which is never called: the backbone and the fused head are "
        "run on their own; leave it out",
    ),
    ("torch_compile_backend", (None,), "it turns --torch_compile on; leave it out"),
    ("torch_compile_mode", (None,), "it turns --torch_compile on; leave it out"),
    (
        "use_liger_kernel",
        (False,),
        "it replaces the model's forward; the fused log-probs are already here; leave it out",
    ),
    (
        "neftune_noise_alpha",
        (None, 0),
        "noise in the embeddings would be taken for a change of the policy; leave it out",
    ),
    (
        "train_sampling_strategy",
        ("random", "sequential"),
        "pairs are packed by tokens without padding, so sorting by length gains nothing and "
        "biases the updates; use random",
    ),
    (
        "ignore_data_skip",
        (False,),
        "a resumed run would see pairs twice and others never; leave it out",
    ),
    (
        "logging_nan_inf_filter",
        (False,),
        "it would show an average in place of a NaN loss; leave it out",
    ),
    (
        "remove_unused_columns",
        (False,),
        "the columns of a pair are no arguments of model.forward; leave it out",
    ),
    (
        "enable_jit_checkpoint",
        (False,),
        "SIGTERM writes a checkpoint after the update in hand anyway; leave it out",
    ),
)

_LAUNCHED_WITH = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
"""Ways of accelerate to split a model, each with the variable by which its launcher says so."""

_IN_MEMORY = "pairs lie in memory as token ids and are packed in this process"
_WITHOUT_LOGITS = "evaluation adds up log-probs and builds no logits"
_NO_WRAPPER = "the ranks sum up their gradients themselves, once an update"
_FIRST_RANK = "the first rank alone prints and saves"

# Options that nothing here reads: setting one logs a warning with this reason.
_UNUSED: dict[str, str] = {
    "pad_to_multiple_of": "nothing is padded; micro_batch_tokens bounds a micro-batch",
    "precompute_ref_batch_size": "micro_batch_tokens bounds the reference pass too",
    "pad_token": "nothing is padded; set tokenizer.pad_token for what comes after training",
    "per_device_eval_batch_size": "micro_batch_tokens bounds a micro-batch of an evaluation too",
    "bf16_full_eval": "evaluation has the precision of training",
    "fp16_full_eval": "evaluation has the precision of training",
    "torch_empty_cache_steps": "micro-batches have few shapes, so the allocator's cache holds",
    "use_cache": "nothing is generated",
    "liger_kernel_config": "there is no Liger kernel to configure",
    "label_names": "pairs have no labels",
    "length_column_name": "lengths are counted in tokens",
    **dict.fromkeys(
        (
            "dataloader_num_workers",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        _IN_MEMORY,
    ),
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "include_for_metrics",
            "batch_eval_metrics",
        ),
        _WITHOUT_LOGITS,
    ),
    "average_tokens_across_devices": "a loss is always that of the whole update",
    "local_rank": "the launcher says it in the environment",
    "fsdp_config": "--fsdp is not built",
    **dict.fromkeys(
        (
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
        ),
        _NO_WRAPPER,
    ),
    **dict.fromkeys(("log_on_each_node", "log_level_replica", "save_on_each_node"), _FIRST_RANK),
}


@dataclass
class DPOConfig(PreferenceOptions, TrlOptions, TrainingArguments):
    """The options of `DPOTrainer`: those of DPO and every `transformers.TrainingArguments`.

    Names and defaults are those of `trl.DPOConfig` (learning_rate 1e-6, logging_steps 10,
    gradient checkpointing on); where fastdpo differs, `PreferenceOptions` says so. bf16 left
    unset is on where CUDA supports it and off elsewhere. Of several GPUs one is used, or one for
    each process that a launcher (torchrun, accelerate launch) starts; the pairs of an update are
    `per_device_train_batch_size * gradient_accumulation_steps`, however many GPUs share them.

    Raises:
        TypeError: an option that does not exist; the message has advice or the nearest name.
        ValueError: a value that is wrong, or an inherited option that cannot work here.
    """

    _argument_group_name = "Training"

    output_dir: str | None = option(
        "fastdpo-output", "Folder of checkpoints, the result and its log."
    )
    learning_rate: float = option(
        1e-6, "Peak learning rate; TRL's default, adapters want about 1e-5."
    )
    logging_steps: float = option(
        10, "Updates between two log lines, or below 1 a share of the run."
    )
    bf16: bool = option(
        None, "Mixed precision in bfloat16; unset: on where CUDA supports it, else off."
    )
    activation_checkpointing: bool | None = option(
        None,
        "Recompute activations in the backward to save memory; unset means on.",
        nargs="?",
        const=True,
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments for activation checkpointing, as a dict or JSON."
    )
    gradient_checkpointing: bool | None = option(
        None,
        "The former name of activation_checkpointing; either may be given.",
        nargs="?",
        const=True,
    )
    logging_nan_inf_filter: bool = option(
        False, "Must stay off: a NaN loss is shown, never replaced by an average."
    )
    allow_config_change: list[str] | None = option(
        None,
        "Settings in which a resumed run may differ from its checkpoint, as the "
        "refusal names them.",
    )
    remove_unused_columns: bool = option(
        False, "Must stay off: pairs are no arguments of model.forward."
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse unknown names with advice, before the generated __init__ does without."""
        known = {entry.name for entry in fields(cls)}
        for name in kwargs:
            if name in known:
                continue
            advice = suggest_option(name, known)
            raise TypeError(f"{cls.__name__} has no option {name!r}: {advice}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        PreferenceOptions.__post_init__(self)  # and, by the order of the bases, TrlOptions
        self._check_inherited()
        self._apply_trl_aliases()
        check_printable("output_dir", self.output_dir)
        self._check_unsupported()
        self._warn_unused()
        self._resolve_checkpointing()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and cuda_has_bf16()
        if ranks.launched() > 1 and not torch.cuda.is_available():
            self.use_cpu = True  # or accelerate, which has seen no GPU, joins nobody
        try:
            TrainingArguments.__post_init__(self)
        except (TypeError, AttributeError, KeyError) as error:  # of a value of the wrong kind
            raise ValueError(
                f"transformers cannot use one of the training options ({error}): compare "
                "--accelerator_config and the other dicts with its documentation."
            ) from error
        for entry in fields(self):  # dicts that were JSON text until here
            check_finite(entry.name, getattr(self, entry.name))
        if self.activation_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}):
            raise ValueError(
                f"--activation_checkpointing_kwargs is {self.activation_checkpointing_kwargs}, "
                "which cannot work here: each layer has its own choice, always without reentrance; "
                "use --activations keep, recompute or offload."
            )
        self._require_group()
        # Trainer wraps the model in nn.DataParallel where this is above 1.
        self._n_gpu = min(self._n_gpu, 1)

    def _check_inherited(self) -> None:
        """Refuse values of inherited options that would fail late, or train something else."""
        for name, check in INHERITED_CHECKS.items():
            if getattr(self, name) is not None or name not in ("eval_steps", "data_seed"):
                check(name, getattr(self, name))
        for entry in fields(self):
            if isinstance(value := getattr(self, entry.name), dict):
                check_keys(entry.name, value)

    def _check_unsupported(self) -> None:
        for name, unset, reason in _REFUSED:
            value = getattr(self, name)
            if value not in unset:
                raise ValueError(f"--{name} is {value!r}, which cannot work here: {reason}.")
        if "tpu_metrics_debug" in (self.debug or ()):
            raise ValueError("--debug tpu_metrics_debug cannot work here: there is no TPU.")
        for name, variable in _LAUNCHED_WITH.items():
            if os.environ.get(variable, "").lower() in ("true", "1"):
                raise ValueError(
                    f"accelerate was started with {name} ({variable}), which cannot work here: "
                    f"{_WHOLE_MODEL}, and start it with accelerate launch --multi_gpu."
                )

    def _require_group(self) -> None:
        """Refuse processes that know of each other and have not been joined."""
        if ranks.launched() > 1 and ranks.count() == 1:
            raise ValueError(
                f"this process is one of {ranks.launched()} (WORLD_SIZE), and they have no group "
                "of torch.distributed: start them with torchrun or accelerate launch, which set "
                "RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too; or take WORLD_SIZE out of the "
                "environment."
            )

    @property
    def tokenizer_options(self) -> dict[str, Any]:
        """Arguments to load the tokenizer of a model given by name: the model's own revision."""
        given = self.from_pretrained_options
        return {
            "revision": given.get("revision") or "main",
            "trust_remote_code": given.get("trust_remote_code", self.trust_remote_code),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a dict in which `pad_token` is not hidden as a secret."""
        return super().to_dict() | {"pad_token": self.pad_token}

    def _apply_trl_aliases(self) -> None:
        """Set our own options as TRL's names require, or refuse where the two contradict."""
        if self.activation_offloading:
            if self.activations not in ("auto", "offload"):
                raise ValueError(
                    f"--activation_offloading and --activations {self.activations} contradict each "
                    "other: keep one. --activations offload means the same."
                )
            self.activations = "offload"
        if self.precompute_ref_log_probs:
            for name, value in (
                ("ref_cache", "off"),
                ("sync_ref_model", True),
                ("reference_free", True),
            ):
                if getattr(self, name) == value:
                    raise ValueError(
                        "--precompute_ref_log_probs asks for stored reference log-probs, and "
                        f"--{name} {value} for none: leave one of them out."
                    )

    def _warn_unused(self) -> None:
        for entry in fields(self):
            if entry.name in _UNUSED:
                unset = (
                    entry.default if entry.default_factory is MISSING else entry.default_factory()
                )
                if getattr(self, entry.name) not in (unset, None):
                    logger.warning("--%s changes nothing: %s.", entry.name, _UNUSED[entry.name])

    def _resolve_checkpointing(self) -> None:
        """Give both names of activation checkpointing one value; transformers 5.23 renamed it."""
        if self.activation_checkpointing is None:
            old = self.gradient_checkpointing
            self.activation_checkpointing = True if old is None else old
        self.gradient_checkpointing = self.activation_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs

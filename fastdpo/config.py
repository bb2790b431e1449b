"""`DPOConfig`: the training arguments of one run, TRL's defaults, and what cannot work refused."""

import os
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from transformers import TrainingArguments

from fastdpo.former_options import explain_unknown
from fastdpo.options import PreferenceOptions

_UNSET: Any = None  # of a field that TrainingArguments declares without None
_ONE_GPU = "fastdpo trains on one GPU in one process; leave it out"

# name, the values that mean "not asked for", and why anything else is refused.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "auto_find_batch_size",
        (False,),
        "the update would depend on the card; bound the memory with --micro_batch_tokens instead",
    ),
    ("deepspeed", (None, ""), _ONE_GPU),
    ("fsdp", (None, "", False, []), _ONE_GPU),
    ("parallelism_config", (None,), _ONE_GPU),
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
        "rows are packed by tokens without padding, so sorting by length gains nothing and "
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
)


@dataclass
class DPOConfig(PreferenceOptions, TrainingArguments):
    """The options of `DPOTrainer`: those of DPO and every `transformers.TrainingArguments`.

    Names and defaults are those of `trl.DPOConfig` (learning_rate 1e-6, logging_steps 10,
    gradient checkpointing on); where fastdpo differs, `PreferenceOptions` says so. bf16 left
    unset is on where CUDA supports it and off elsewhere. Of several GPUs one is used.

    Raises:
        TypeError: an option that does not exist; the message has advice or the nearest name.
        ValueError: a value that is wrong, or an inherited option that cannot work here.
    """

    _argument_group_name = "Training"

    output_dir: str | None = field(
        default="fastdpo-output",
        metadata={"help": "Folder of checkpoints, the result and its log."},
    )
    learning_rate: float = field(
        default=1e-6,
        metadata={"help": "Peak learning rate; TRL's default, adapters want about 1e-5."},
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Updates between two log lines, or below 1 a share of the run."},
    )
    bf16: bool = field(
        default=_UNSET,
        metadata={
            "help": "Mixed precision in bfloat16; unset: on where CUDA supports it, else off."
        },
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward to save memory; unset means on.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments for activation checkpointing, as a dict or JSON."},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "The former name of activation_checkpointing; either may be given.",
            "nargs": "?",
            "const": True,
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Must stay off: a NaN loss is shown, never replaced by an average."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Must stay off: pairs are no arguments of model.forward."},
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse unknown names with advice, before the generated __init__ does without."""
        known = {entry.name for entry in fields(cls)}
        for name in kwargs:
            if name in known:
                continue
            advice = explain_unknown(name, known)
            if name == "trust_remote_code":  # an option of the command
                advice = "pass model_init_kwargs={'trust_remote_code': True}."
            raise TypeError(f"{cls.__name__} has no option {name!r}: {advice}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        PreferenceOptions.__post_init__(self)
        self._refuse_what_cannot_work()
        self._resolve_checkpointing()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and cuda_has_bf16()
        TrainingArguments.__post_init__(self)
        # Trainer wraps the model in nn.DataParallel where this is above 1.
        self._n_gpu = min(self._n_gpu, 1)

    def _refuse_what_cannot_work(self) -> None:
        for name, unset, reason in _REFUSED:
            value = getattr(self, name)
            if value not in unset:
                raise ValueError(f"--{name} is {value!r}, which cannot work here: {reason}.")
        if "tpu_metrics_debug" in (self.debug or ()):
            raise ValueError(f"--debug tpu_metrics_debug cannot work here: {_ONE_GPU}.")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise ValueError(
                f"this process is one of {processes} (WORLD_SIZE); fastdpo trains on one GPU in "
                "one process: start it with python, not with a distributed launcher."
            )

    def _resolve_checkpointing(self) -> None:
        """Give both names of activation checkpointing one value; transformers 5.23 renamed it."""
        if self.activation_checkpointing is None:
            old = self.gradient_checkpointing
            self.activation_checkpointing = True if old is None else old
        self.gradient_checkpointing = self.activation_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs


def cuda_has_bf16() -> bool:
    """Whether there is a CUDA card with bfloat16 units (compute capability 8.0 or later)."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)

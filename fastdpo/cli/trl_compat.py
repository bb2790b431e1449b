"""The names that a script written for TRL imports beside its trainer, for model and adapter.

Names, defaults and return values are those of TRL 1.16's `scripts/dpo.py`; where one of TRL's
defaults is a trap, the docstring says what is done in its place.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdpo.options.checks import Options, as_names, option
from fastdpo.options.model import DTYPES, LORA_ALPHA, LORA_DROPOUT, LORA_R

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

QUANT_TYPES = ("nf4", "fp4")


@dataclass
class ModelConfig(Options):
    """Options for model, precision and adapter under TRL's names and with its defaults.

    Two defaults are not TRL's: 4-bit weights have their scales quantized too
    (`use_bnb_nested_quant`), and a single name in `lora_target_modules` is a name and not a pattern
    for whole paths. `attn_implementation` changes nothing and says so.

    Raises:
        ValueError: a wrong value, or one that cannot be done here, with what to do.
    """

    model_name_or_path: str | None = option(None, "Folder or hub id of the model to train.")
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    dtype: str | None = option(
        "float32",
        "Precision of the loaded weights; auto is bfloat16 on a CUDA GPU that supports it, else "
        "float32.",
        choices=list(DTYPES),
    )
    attn_implementation: str | None = option(
        None, "Not used: attention over packed pairs is fastdpo's own."
    )
    use_peft: bool = option(False, "Train a LoRA adapter.")
    lora_r: int = option(16, "Rank of the adapter.", check=LORA_R)
    lora_alpha: int = option(32, "Adapter scale, applied as alpha / r.", check=LORA_ALPHA)
    lora_dropout: float = option(
        0.05, "Dropout before the adapter, 0 to below 1.", check=LORA_DROPOUT
    )
    lora_target_modules: list[str] | None = option(
        None, "Layers that get an adapter, or all-linear. Unset: what PEFT has for the model."
    )
    lora_target_parameters: list[str] | None = option(
        None, "Parameters that are no layers and get an adapter."
    )
    lora_modules_to_save: list[str] | None = option(
        None, "Layers that are trained as a whole beside the adapter."
    )
    lora_task_type: str = option("CAUSAL_LM", "Must be CAUSAL_LM.")
    use_rslora: bool = option(False, "Scale the adapter by alpha / sqrt(r).")
    use_dora: bool = option(False, "DoRA, run by PEFT's own slower layers.")
    load_in_8bit: bool = option(False, "Must stay off; 4 bits are what is built.")
    load_in_4bit: bool = option(False, "Load the weights in 4 bits, for an adapter.")
    bnb_4bit_quant_type: str = option("nf4", "Kind of 4-bit weights.", choices=list(QUANT_TYPES))
    use_bnb_nested_quant: bool = option(
        True, "Quantize the scales of 4-bit weights too; on, for 0.4 bits a weight less."
    )
    bnb_4bit_quant_storage: str | None = option(None, "Must stay unset; it serves FSDP.")

    def __post_init__(self) -> None:
        if self.load_in_8bit:
            raise ValueError(
                "--load_in_8bit cannot work here: 8-bit weights are not built. Use --load_in_4bit, "
                "or leave it out."
            )
        if self.bnb_4bit_quant_storage not in (None, "uint8"):
            raise ValueError(
                f"--bnb_4bit_quant_storage is {self.bnb_4bit_quant_storage!r}, which serves FSDP; "
                "fastdpo keeps the whole model on each GPU: leave it out."
            )
        if self.lora_task_type != "CAUSAL_LM":
            raise ValueError(
                f"--lora_task_type is {self.lora_task_type!r}; DPO trains a causal language model: "
                "leave it out."
            )
        if self.load_in_4bit and not self.use_peft:
            raise ValueError(
                "--load_in_4bit is given without --use_peft, and 4-bit weights cannot be trained "
                "themselves: add --use_peft."
            )
        if self.dtype is None:
            self.dtype = "auto"
        super().__post_init__()
        for name in ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
            setattr(self, name, as_names(getattr(self, name)))
        if self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = "all-linear"  # pyrefly: ignore[bad-assignment]
        if self.attn_implementation is not None:
            logger.warning(
                "--attn_implementation %s changes nothing: attention over packed pairs is "
                "fastdpo's own.",
                self.attn_implementation,
            )
            self.attn_implementation = None


def get_quantization_config(model_args: ModelConfig) -> "BitsAndBytesConfig | None":
    """Make the quantization config that `model_args` stands for.

    The compute dtype is that of the other weights, as in TRL. On a GPU set `dtype` to bfloat16:
    with TRL's default, float32, embeddings and head take twice the memory.

    Returns:
        None without `load_in_4bit`, else NF4 (or FP4) with its scales quantized too, unless
        `use_bnb_nested_quant` is turned off.
    """
    if not model_args.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    from fastdpo.modeling.loading import resolve_dtype

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=resolve_dtype(str(model_args.dtype)),
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
    )


def get_peft_config(model_args: ModelConfig) -> "LoraConfig | None":
    """Make the config of the adapter that `model_args` stands for; None without `use_peft`."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )

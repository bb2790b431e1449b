"""The arguments of DPOTrainer: each is of its kind, or named with what to pass instead."""

import os
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.config import DPOConfig


def refuse_arguments(**arguments: Any) -> None:
    """Raise TypeError for arguments of TRL's DPOTrainer that ours cannot take."""
    reasons = {
        "data_collator": "pairs are packed without padding",
    }
    for name, value in arguments.items():
        if value is not None:
            raise TypeError(f"DPOTrainer takes no {name}: {reasons[name]}. Leave it out.")


def check_arguments(
    *,
    model: Any,
    ref_model: Any,
    args: Any,
    processing_class: Any,
    peft_config: Any,
    optimizers: Any,
    loss_function: Any,
    compute_metrics: Any,
) -> None:
    """Raise TypeError for an argument of another kind than DPOTrainer takes.

    The arguments are those of `DPOTrainer`.
    """
    if args is not None and not isinstance(args, DPOConfig):
        raise _wrong("args", args, "a fastdpo.DPOConfig", _advice_on_args(args))
    names = (str, os.PathLike, PreTrainedModel, PeftModel)
    what = "a causal LM of transformers, a PeftModel on one, or the name of one"
    if not isinstance(model, names):
        raise _wrong("model", model, what, "load it with AutoModelForCausalLM.from_pretrained")
    if ref_model is not None and not isinstance(ref_model, names):
        raise _wrong("ref_model", ref_model, what, "leave it out for the usual reference")
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        remedy = "pass AutoTokenizer.from_pretrained(NAME), or leave it out"
        if hasattr(processing_class, "tokenizer"):
            remedy = "text alone is trained: pass its .tokenizer"
        raise _wrong("processing_class", processing_class, "a tokenizer", remedy)
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        remedy = "pass peft.LoraConfig(r=16, target_modules='all-linear')"
        if isinstance(peft_config, dict):
            remedy = "pass peft.LoraConfig(**peft_config)"
        raise _wrong("peft_config", peft_config, "a config of PEFT", remedy)
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        remedy = "pass (optimizer, None) to have the schedule of the options"
        raise _wrong("optimizers", optimizers, "a pair (optimizer, scheduler)", remedy)
    if loss_function is not None and not callable(loss_function):
        remedy = "loss_type in DPOConfig names one; see fastdpo.losses.PairLogps for your own"
        raise _wrong("loss_function", loss_function, "a function of the pairs' log-probs", remedy)
    if compute_metrics is not None and not callable(compute_metrics):
        remedy = "it returns a dict of numbers; leave it out if what is logged suffices"
        raise _wrong("compute_metrics", compute_metrics, "a function of an EvalPrediction", remedy)


def _advice_on_args(args: Any) -> str:
    if isinstance(args, dict):
        return "pass DPOConfig(**args)"
    if isinstance(args, str | os.PathLike):
        return "pass DPOConfig(output_dir)"
    return "its options have the same names: import DPOConfig from fastdpo"


def _wrong(name: str, value: Any, needed: str, remedy: str) -> TypeError:
    kind = type(value)
    module = kind.__module__.split(".")[0]
    own = kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"
    return TypeError(f"{name} is a {own} and has to be {needed}: {remedy}.")

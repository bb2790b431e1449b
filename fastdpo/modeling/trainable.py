"""Refuse models that cannot be trained here, by their weights and their adapters."""

from typing import Any

import bitsandbytes as bnb
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig

from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.peft_types import check_peft_type

_FOUR_BITS = "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)"


def check_quantization_config(config: Any) -> None:
    """Refuse, before anything is loaded, to quantize weights in a way that is not built.

    Args:
        config: what from_pretrained takes as `quantization_config`; None passes.

    Raises:
        ValueError: it is not 4 bits by bitsandbytes.
    """
    if config is None:
        return
    if isinstance(config, dict):
        four = bool(config.get("load_in_4bit"))
        found = next((str(name) for name in config if str(name).startswith("load_in")), "a dict")
    else:
        four = isinstance(config, BitsAndBytesConfig) and bool(config.load_in_4bit)
        found = type(config).__name__
    if isinstance(config, BitsAndBytesConfig) and config.load_in_8bit:
        found = "load_in_8bit"
    if not four:
        raise ValueError(
            f"quantization_config is {found}, and weights of 4 bits by bitsandbytes are what is "
            f"built: pass {_FOUR_BITS}, or leave it out."
        )


def check_quantization(model: nn.Module) -> None:
    """Refuse a model whose weights are quantized in another way than 4 bits by bitsandbytes.

    The log-probs of 8-bit weights depend on what else is in a micro-batch, and adapters on them
    have no fused forward; other ways have layers that the passes would misread.

    Raises:
        ValueError: it is; names how.
    """
    causal_lm = unwrap_model(model)
    method = None
    if any(isinstance(module, bnb.nn.Linear8bitLt) for module in causal_lm.modules()):
        method = "8 bits by bitsandbytes"
    elif (quantizer := getattr(causal_lm, "hf_quantizer", None)) is not None:
        named = getattr(quantizer.quantization_config, "quant_method", None)
        method = str(getattr(named, "value", named))
        if method == "bitsandbytes" and getattr(causal_lm, "is_loaded_in_4bit", False):
            method = None
    if method is not None:
        raise ValueError(
            f"the model's weights are quantized ({method}), and whole weights or those of 4 bits "
            f"by bitsandbytes are what is built: load it with {_FOUR_BITS}, or whole."
        )


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that are not PEFT's own wrapper around a model, or not one active one.

    Raises:
        ValueError: says how to load or choose the adapter, or why its kind is not trained here.
    """
    if not isinstance(model, PeftModel):
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "the model holds adapters that lie in it without a PeftModel around it "
                "(model.add_adapter, inject_adapter_in_model, or a folder of an adapter given to "
                "AutoModelForCausalLM): it could be neither saved nor resumed as an adapter. Pass "
                "the base with peft_config, get_peft_model(base, config), or "
                "PeftModel.from_pretrained(base, folder, is_trainable=True)."
            )
        return
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"{len(active)} adapters are active ({', '.join(active) or 'none'}) and one is "
            f"trained: choose with model.set_adapter(NAME), of {', '.join(model.peft_config)}."
        )
    four_bit = getattr(unwrap_model(model), "is_loaded_in_4bit", False)
    check_peft_type(model.peft_config[active[0]], four_bit=four_bit)


def check_trainable(model: nn.Module) -> None:
    """Refuse a model of which nothing is trained, or of 4-bit weights without an adapter.

    Raises:
        ValueError: says what to pass.
    """
    if not isinstance(model, PeftModel) and getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(
            "the model's weights have 4 bits, which cannot be trained themselves: pass "
            "peft_config, such as LoraConfig(target_modules='all-linear')."
        )
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            "nothing of the model is trained: its adapter is frozen. Load it with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True), and leave inference_mode "
            "out of its config."
        )
    raise ValueError(
        "nothing of the model is trained: every weight is frozen. Pass peft_config to train an "
        "adapter, or call model.requires_grad_(True) to train all of it."
    )

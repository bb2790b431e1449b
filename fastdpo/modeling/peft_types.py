"""Refuse PEFT's kinds of adapters that packed pairs cannot train, each with its reason.

An adapter can be trained here if all of its work is done inside modules of the decoder, each token
by itself, so that its forward is the decoder's, and if it leaves the base as it is when it is off.
`tests/modeling/test_peft_types.py` trains every type of the first table, and asks both tables for
every type that PEFT has.
"""

from typing import Any

from peft import PeftConfig

_VIRTUAL = (
    "it puts virtual tokens or cached keys before the text, outside the decoder's layers, and a "
    "packed sequence has no place for them"
)

TRAINED = {
    "LORA": True, "BOFT": True, "IA3": True, "BEFT": True, "LILY": True, "OFT": True,
    "LN_TUNING": True, "VERA": True, "FOURIERFT": True, "VBLORA": True, "MISS": True,
    "RANDLORA": True, "ROAD": True, "TRAINABLE_TOKENS": True, "HIRA": True, "SHIRA": True,
    "WAVEFT": True, "LOHA": False, "LOKR": False, "FROD": False, "GLORA": False, "HRA": False,
    "UNILORA": False, "C3A": True, "OSF": False, "DELORA": False, "GRALORA": True,
    "TINYLORA": False, "PSOFT": False, "PEANUT": False, "SUPERTUNING": False, "DEFT": False,
}  # fmt: skip
"""The types that are trained, and whether on 4-bit weights too; the others fail there or err."""

REFUSED = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT",
         "CARTRIDGE"),
        _VIRTUAL,
    ),
    "ADAPTION_PROMPT": "it puts attention modules of its own in place of the model's",
    "ADALORA": "it allocates its ranks and adds a loss of its own outside its layers",
    "ADAMSS": "it chooses its subspaces outside its layers",
    "POLY": "it wants the id of a task with every sequence",
    "XLORA": "it mixes other adapters by a pass of its own through the whole model",
    "SHADOW": "it carries hidden states of its own through the whole model",
    "PVERA": (
        "it draws random numbers in every forward of training, so the policy would differ from "
        "its reference before the first update"
    ),
}  # fmt: skip
"""The types that are not, and why; completes a sentence."""

LORA_VARIANTS = {
    "alora_invocation_tokens": (
        "activated LoRA finds its tokens outside its layers, where nothing would be trained"
    ),
    "layer_replication": "it changes the layers of the base, which the reference needs as they are",
    "monteclora_config": (
        "MonteCLoRA draws random numbers in every forward of training and adds a loss outside its "
        "layers"
    ),
    "kasa_config": "KaSA truncates the weights of the base, which the reference needs as they are",
    "arrow_config": "Arrow routes between other adapters and trains none",
}
"""Fields of LoraConfig that make LoRA what is not trained here, and why."""


def check_peft_type(config: PeftConfig, *, four_bit: bool = False) -> None:
    """Refuse an adapter that would not be trained right.

    Args:
        config: of the adapter.
        four_bit: whether it lies on 4-bit weights.

    Raises:
        ValueError: names the type or the field, and says why.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in TRAINED:
        reason = REFUSED.get(kind, "this version of fastdpo has not tried it")
        raise ValueError(
            f"{type(config).__name__} ({kind}) cannot be used here: {reason}. Use LoRA: "
            "LoraConfig(target_modules='all-linear')."
        )
    if four_bit and not TRAINED[kind]:
        raise ValueError(
            f"{type(config).__name__} ({kind}) cannot be used on 4-bit weights: PEFT has no form "
            "of it that reads them. Use LoRA, or load the base whole (--lora)."
        )
    for name, reason in LORA_VARIANTS.items():
        if _is_set(getattr(config, name, None)):
            raise ValueError(
                f"{type(config).__name__} has {name}, which cannot be used here: {reason}. Leave "
                "it out."
            )


def _is_set(value: Any) -> bool:
    return value is not None and value != []

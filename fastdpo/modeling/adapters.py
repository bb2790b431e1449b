"""LoRA on one set of weights: adapters on is the policy, adapters off is the reference.

PEFT builds, saves, loads and merges; only the forward of its LoRA layers is ours.
`replace_lora_forward` changes the class of the layers in place to a subclass whose forward is
`lora_linear`, which works alike for adapters made here and for a PeftModel that the user brings.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
from fastdpo_kernels import LoraModule, lora_linear
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from fastdpo.modeling.adapter_config import check_patterns
from fastdpo.modeling.adapter_starts import (
    AdapterStartError,
    base_kept,
    drawn_config,
    require_base_kept,
)
from fastdpo.modeling.base_weights import move_resident
from fastdpo.modeling.families import family_of
from fastdpo.modeling.finite import require_finite_adapter, require_finite_scale
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.multimodal import other_towers, tower_pattern
from fastdpo.modeling.peft_types import check_peft_type
from fastdpo.modeling.shared_input import SharedInput
from fastdpo.system.oom import oom_message

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"

TRAINING_ARGUMENTS = "training_args.json"
"""File beside a trained adapter or model: the options of its run."""

BASE_IN_4BIT = "base_in_4bit"
"""Its key, beside the options, for whether the weights below the adapter were 4-bit ones."""


class AdapterError(ValueError):
    """An adapter that cannot be read, or does not fit its base."""


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer that never repacks its weight.

    bitsandbytes' own forward rewrites the weight in place for inference on CPUs with AVX512-BF16
    at the first no-grad call in eval mode; training on it afterwards reads garbage.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (..., out) for x (..., in), in x's dtype."""
        return lora_linear(x, self.weight, bias=_cast(self.bias, x))


class _FusedForward:
    """A LoRA layer's forward as one autograd node where it is plain LoRA; PEFT's elsewhere."""

    shared_input: SharedInput | None = None
    """The layers that read the same input, whose adapters are stacked, this one among them."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # pyrefly: ignore
        if self.shared_input is not None:
            out = self.shared_input.output_of(self, x)
            if out is not None:
                return out
        plain = self.plain_lora(x)
        if plain is None:
            return super().forward(x)  # pyrefly: ignore
        module, dropout = plain
        return lora_linear(x, **module._asdict(), dropout=dropout)

    def plain_lora(self: Any, x: Tensor) -> tuple[LoraModule, float] | None:
        """The arguments of `lora_linear` for x now, and the dropout; None if it is more than LoRA.

        Without adapter while adapters are off.
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        off = self.disable_adapters or not active
        plain = off or (len(active) == 1 and _is_plain(self, active[0]))
        base = self.base_layer
        if self.merged or not plain or not _is_frozen(base):
            return None
        bias = _cast(base.bias, x)
        if off:
            return LoraModule(base.weight, bias=bias), 0.0
        name = active[0]
        dropout = self.lora_dropout[name]
        matrices = self.lora_A[name].weight, self.lora_B[name].weight
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return LoraModule(base.weight, *matrices, bias, self.scaling[name]), rate


class FusedLoraLinear(_FusedForward, lora.Linear):
    """PEFT's LoRA on a dense linear layer, with the fused forward."""


class FusedLoraLinear4bit(_FusedForward, PeftLinear4bit):
    """PEFT's LoRA on a 4-bit linear layer, with the fused forward."""


def replace_lora_forward(model: nn.Module) -> None:
    """Give every LoRA and 4-bit linear layer its fused forward, in place; may be called again."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = FrozenLinear4bit
        elif type(module) is PeftLinear4bit:
            module.__class__ = FusedLoraLinear4bit
        elif type(module) is lora.Linear and isinstance(module.base_layer, nn.Linear):
            module.__class__ = FusedLoraLinear
    layers = [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
    if stock := sorted({kind for layer in layers if (kind := _unfused_reason(layer))}):
        logger.warning("These adapter layers run PEFT's own forward: %s.", ", ".join(stock))


def _unfused_reason(layer: Any) -> str | None:
    """Why `lora_linear` cannot compute an adapter layer, or None."""
    if type(layer) not in (FusedLoraLinear, FusedLoraLinear4bit):
        return f"{type(layer).__name__} on {type(layer.get_base_layer()).__name__}"
    if layer.lora_variant:
        return ", ".join(
            sorted({type(variant).__name__ for variant in layer.lora_variant.values()})
        )
    if not all(_is_plain(layer, name) for name in layer.lora_A):
        return "lora_bias"
    return None if _is_frozen(layer.base_layer) else "a trained weight or bias of the base"


def _is_plain(layer: Any, adapter: str) -> bool:
    """Tell whether an adapter is LoRA and no more: no variant such as DoRA, no trained bias."""
    return adapter not in layer.lora_variant and not layer.lora_bias.get(adapter, False)


def _is_frozen(base: Any) -> bool:
    return not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig) -> PeftModel:
    """Put a new adapter on the model, its weights in fp32 whatever the base's dtype.

    Raises:
        ValueError: the model has an adapter already, this kind of adapter is not trained here, or
            the new one would write to the base.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model is a PeftModel already and peft_config asks for another adapter: pass one "
            "or the other. Merge the first adapter, or train it on by leaving peft_config out."
        )
    check_peft_type(peft_config, four_bit=getattr(model, "is_loaded_in_4bit", False))
    _exclude_unadapted(model, peft_config)
    drawn = drawn_config(model, peft_config)
    if drawn is not peft_config:
        logger.warning(
            "init_lora_weights is 'lora_ga' and preprocess_loraga has left no gradients: the "
            "adapter is drawn as PEFT draws any other, and saved as such."
        )
    replace_lora_forward(model)
    with base_kept(model, f"the adapter of peft_config ({type(drawn).__name__})"):
        adapted = get_peft_model(model, drawn, autocast_adapter_dtype=True)
    replace_lora_forward(adapted)
    move_resident(adapted)
    return adapted


def _exclude_unadapted(model: PreTrainedModel, peft_config: Any) -> None:
    """Leave out layers that text does not train, and of "all-linear" those that take no adapter."""
    target = getattr(peft_config, "target_modules", None)
    everywhere = target == "all-linear"
    if target is None or (isinstance(target, str) and not everywhere):
        return  # a pattern says what it means
    if getattr(peft_config, "exclude_modules", None):
        return
    names = family_of(model.config.get_text_config()).unadapted_linears if everywhere else ()
    if names:
        peft_config.exclude_modules = list(names)
        logger.info("No adapter lies on %s, which can have none.", " and ".join(names))
    if towers := tower_pattern(model):
        unread = rf"|(.+\.)?({'|'.join(names)})" if names else ""
        peft_config.exclude_modules = towers + unread
        logger.info("No adapter lies on %s: text trains none.", ", ".join(other_towers(model)))


def lora_config(
    r: int,
    alpha: int,
    dropout: float,
    target_modules: list[str] | None,
    *,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> LoraConfig:
    """PEFT's config of LoRA on the named modules, by default every linear layer but the head."""
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        target_modules=target_modules or "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )


def check_base_frozen(model: nn.Module) -> None:
    """Refuse a PeftModel that also trains tensors of the base: they would move the reference.

    Raises:
        ValueError: names the first of them.
    """
    if not isinstance(model, PeftModel):
        return
    adapter_marks = (f".{model.base_model.prefix}", ".modules_to_save.", ".trainable_tokens_")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(mark in name for mark in adapter_marks):
            raise ValueError(
                f"{name} belongs to the base and is trained: with the adapter off it would still "
                "differ, and the reference is the base. Set bias='none' in the LoraConfig, and "
                "requires_grad_(False) on tensors of the base."
            )


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool = False) -> PeftModel:
    """Load the adapter of a folder onto its base, with the fused forward.

    Args:
        model: the base.
        folder: an --output_dir or any PEFT folder.
        trainable: whether the adapter will be trained further.

    Raises:
        ValueError: there is no adapter there, its weights do not fit this base, it would write to
            the base, or its weights or their scale are not finite.
    """
    replace_lora_forward(model)
    with _strict_load(model, folder) as load, base_kept(model, f"the adapter in {folder}"):
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        load(adapted, "default", is_trainable=trainable)  # from_pretrained alone only warns
    replace_lora_forward(adapted)
    move_resident(adapted)
    return adapted


def load_second_adapter(model: PeftModel, folder: str, name: str) -> None:
    """Load the adapter of a folder under another name, beside the one that the model has.

    Raises:
        ValueError: its weights do not fit this base, it would write to the base, or its weights or
            their scale are not finite.
    """
    with _strict_load(model, folder) as load, base_kept(model, f"the adapter in {folder}"):
        load(model, name)
    move_resident(model)


@contextmanager
def _strict_load(base: PreTrainedModel | PeftModel, folder: str) -> Iterator[Callable[..., None]]:
    """Yield a function (model, name) that loads the folder's weights, all of them.

    It raises a ValueError where weights are missing, surplus or of another shape; PEFT alone leaves
    a matrix whose name it does not find as it was drawn, with a warning. PEFT runs the
    initialization of the adapter's config before it loads.
    """
    peft_config = read_adapter_config(folder)
    check_peft_type(peft_config, four_bit=getattr(unwrap_model(base), "is_loaded_in_4bit", False))
    config = peft_config.to_dict()
    names = [name for name, _ in base.named_modules()]
    check_patterns(config, names, folder)
    if Path(folder).is_dir() and not list(Path(folder).glob("adapter_model.*")):
        raise AdapterError(
            f"the adapter in {folder} has no weights: adapter_model.safetensors is missing; copy "
            "or download the folder again."
        )
    require_finite_scale(config, f"the adapter in {folder}")

    def load(model: PeftModel, name: str, **options: Any) -> None:
        result = model.load_adapter(folder, adapter_name=name, **options)
        require_finite_adapter(model, name, folder)
        surplus = [key for key in result.unexpected_keys if ".lora_" in key]
        missing = _truly_missing(model, result.missing_keys)
        for problem, keys in (("lacks", missing), ("has no place for", surplus)):
            if keys:
                raise AdapterError(
                    f"the adapter in {folder} does not fit this base: it is of another model or "
                    f"another version of PEFT, and {problem} {keys[0]} ({len(keys)} such). Pass "
                    "the base that it was trained on."
                )

    try:
        yield load
    except (AdapterError, AdapterStartError, ImportError, MemoryError):
        raise
    except Exception as error:  # torch: the shapes differ; safetensors: damaged; PEFT: anything
        if isinstance(error, RuntimeError) and oom_message(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        raise AdapterError(
            f"the adapter in {folder} does not fit this base, or is damaged "
            f"({type(error).__name__}: {reason}): pass the base that it was trained on, or copy or "
            "download the adapter again."
        ) from error


def _truly_missing(model: nn.Module, keys: list[str]) -> list[str]:
    """The keys but for those of a tensor that was loaded under another name (a shared one)."""
    if not keys:
        return keys
    tensors = model.state_dict()
    loaded = {each.data_ptr() for name, each in tensors.items() if name not in keys}
    return [key for key in keys if key not in tensors or tensors[key].data_ptr() not in loaded]


def is_adapter(name: str) -> bool:
    """Tell whether a folder holds an adapter rather than a model."""
    folder = Path(name)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_model_name(folder: str) -> str:
    """The name of the model that an adapter was trained on.

    Raises:
        ValueError: the folder holds no adapter, one that does not say, or one that would write to
            the base.
    """
    base = read_adapter_config(folder).base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter in {folder} does not name its base: pass it as --model.")
    return base


def read_adapter_config(folder: str) -> PeftConfig:
    """The adapter_config.json of a folder, once it is known to leave the base as it is.

    Raises:
        ValueError: the folder holds no adapter, a damaged one, or one that would write to the base.
    """
    file = Path(folder) / ADAPTER_CONFIG
    try:
        if file.is_file():  # before PEFT looks for what an initialization needs
            require_base_kept(json.loads(file.read_text("utf-8")), str(file))
        return PeftConfig.from_pretrained(folder)
    except AdapterStartError:
        raise
    except Exception as error:  # PEFT raises what its parsing of the file happens to meet
        reason = (str(error).strip().splitlines() or [""])[0]
        raise AdapterError(
            f"{folder} holds no adapter ({type(error).__name__}: {reason}): need a folder with "
            "adapter_config.json and adapter_model.safetensors, such as the --output_dir of a run "
            "with --lora or --qlora."
        ) from error


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Turn all adapters off, which makes the reference; on exit everything is as before.

    PEFT's own context turns `requires_grad` on for every LoRA parameter when it ends, frozen ones
    too; the flags are put back here. A model without adapters is its own reference.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)

"""An adapter's folder, read: low-rank updates of modules, and tensors that were trained whole."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from fastdpo.merging.model_files import model_file
from fastdpo.merging.tensor_files import StoredTensor, check_mergeable, tensors_of
from fastdpo.modeling.adapter_config import check_patterns
from fastdpo.modeling.adapter_starts import CONVERT, start_fault
from fastdpo.modeling.finite import nonfinite_adapter, nonfinite_tensors, require_finite_scale

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?:\.weight)?"
)
_KNOWN = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
))  # fmt: skip
"""Keys of adapter_config.json that change nothing here, or that are taken into account."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one module.

    Attributes:
        a: (r, in), or (r, rows) of an embedding.
        b: (out, r), or (width, r) of an embedding.
        scaling: alpha / r, or alpha / sqrt(r).
        bias: (out,) of b, if it has one.
        magnitude: (out,) of DoRA, if the module has it.
        embedding: whether it looks up its rows, so that the update is (b a) transposed.
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    bias: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: its config and its tensors, which stay on disk.

    Attributes:
        folder: the folder.
        config: its adapter_config.json.
        low_rank: the update of each module that has one, by the module's name.
        whole: the tensors that take the place of one of the base, by that one's name.
    """

    folder: Path
    config: Mapping[str, Any]
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, StoredTensor]


def read_adapter(folder: Path) -> Adapter:
    """Read a folder as PEFT writes it; the tensors stay on disk.

    Raises:
        ValueError: there is no adapter, or one of a kind that can't be merged rightly, by name.
    """
    try:
        config_file = model_file(folder, "adapter_config.json")
        weights = model_file(folder, "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no adapter ({error}): need a folder with adapter_config.json and "
            "adapter_model.safetensors, such as the --output_dir of a run with --lora or --qlora."
        ) from None
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} holds a {type(config).__name__}, no object.")
    _refuse_other_kinds(config, config_file)
    require_finite_scale(config, str(config_file))
    parts: dict[str, dict[str, StoredTensor]] = {}
    whole = {}
    stored = tensors_of(weights)
    if wrong := [name for name, each in stored.items() if nonfinite_tensors({name: each.read()})]:
        raise ValueError(nonfinite_adapter(str(folder), wrong, len(stored)))
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX)
        check_mergeable(tensor)
        if match := _LOW_RANK.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif "lora_" in name or "token_adapter" in name:
            raise ValueError(
                f"{weights}: how {name} is merged is not known here. Merge it with PEFT's "
                "merge_and_unload, or keep the adapter as it is."
            )
        else:
            whole[name.replace(".base_layer.", ".")] = tensor
    check_patterns(config, parts, str(folder))
    low_rank = {module: _update(config, module, each, weights) for module, each in parts.items()}
    return Adapter(folder, config, low_rank, whole)


def _refuse_other_kinds(config: Mapping[str, Any], file: Path) -> None:
    """Refuse what is not plain LoRA on an unchanged base; names the key of the config."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{file}: the adapter is of the type {config.get('peft_type')}; only LORA is merged. "
            "Merge it with PEFT's merge_and_unload."
        )
    if fault := start_fault(config):
        raise ValueError(f"{file}: {fault}. {CONVERT}.")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"{file}: bias is {config['bias']!r}; none, all and lora_only are known.")
    defaults = {entry.name: entry.default for entry in dataclasses.fields(LoraConfig)}
    for name, value in config.items():
        if name not in _KNOWN and value and value != defaults.get(name) and value != {}:
            raise ValueError(
                f"{file}: {name} is {value!r}; how that is merged is not known here. Merge it with "
                "PEFT's merge_and_unload, or keep the adapter as it is."
            )


def _update(
    config: Mapping[str, Any], module: str, parts: Mapping[str, StoredTensor], file: Path
) -> LowRank:
    embedding = "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [name for name in names if name not in parts]:
        raise ValueError(f"{file}: {module} has no {missing[0]}: copy or save the adapter again.")
    a, b = (parts[name] for name in names)
    return LowRank(
        a,
        b,
        _scaling(config, module, a.shape[0]),
        bias=parts.get("lora_B.bias"),
        magnitude=parts.get("lora_magnitude_vector"),
        embedding=embedding,
    )


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"adapter_config.json has {alpha!r} as alpha of {module}, no number.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

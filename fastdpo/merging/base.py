"""The base of a merge: its files, and what its modules are, without its weights in memory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from fastdpo.merging.model_files import are_plain_names, model_file
from fastdpo.merging.tensor_files import StoredTensor, tensors_of
from fastdpo.modeling.loading import HUB_HINT, ModelError
from fastdpo.modeling.multimodal import auto_class

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Base:
    """A model's folder.

    Attributes:
        name: the model, as the user named it.
        folder: the folder that holds its files.
        config: the content of its config.json.
        shards: the tensors of each weight file, by file name and tensor name.
        kinds: "linear", "transposed" (weight is (in, out)), "embedding" or the class's name, by
            module name.
        in_4bit: names of the modules that `--qlora` holds in 4 bits.
        tied: for each tied tensor the one it is tied to, by their names in the loaded model.
        auto_class: the name of the class of transformers that loads it.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, StoredTensor]]
    kinds: Mapping[str, str]
    in_4bit: frozenset[str]
    tied: Mapping[str, str]
    auto_class: str

    @cached_property
    def file_of(self) -> dict[str, str]:
        """The file that holds each stored tensor, by the tensor's name in the files."""
        return {name: file for file, tensors in self.shards.items() for name in tensors}

    def stored_name(self, name: str) -> str | None:
        """The name that the files give to a tensor of the loaded model; None if they lack it.

        Some files leave the first parts of the name out, and those of models that see have them in
        another order: language_model.model for model.language_model.
        """
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        same_parts = self._name_of_parts.get(tuple(sorted(parts)))
        return next((end for end in ends if end in self.file_of), same_parts)

    @cached_property
    def _name_of_parts(self) -> dict[tuple[str, ...], str]:
        return {tuple(sorted(name.split("."))): name for name in self.file_of}


def find_base(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Base:
    """Find a model's files and learn its modules, in a folder or on the hub.

    Raises:
        ModelError: it is not there, not in safetensors, or its weights are quantized already.
    """
    folder = Path(name) if Path(name).is_dir() else _from_hub(name, revision)
    try:
        config_file = model_file(folder, "config.json")
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__} in place of an object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{name!r} is no model: its config.json: {error}. {HUB_HINT}") from error
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ModelError(
            f"the weights of {name!r} are quantized ({method}), and an adapter merges into whole "
            "ones: pass the model that they were quantized from as --model."
        )
    shards = _shards(folder, name)
    try:
        with torch.device("meta"):
            of_model = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            loads = auto_class(of_model)
            model = loads.from_config(of_model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot tell what {name!r} is made of: {error}") from error
    kinds = {module_name: _kind(module) for module_name, module in model.named_modules()}
    tied = dict(model.all_tied_weights_keys)
    in_4bit = _modules_in_4bit(model)
    return Base(name, folder, config, shards, kinds, in_4bit, tied, loads.__name__)


def _from_hub(name: str, revision: str) -> Path:
    """The folder of a hub model in the local cache, downloaded where it is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*"]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(f"cannot find the model {name!r}: {error} {HUB_HINT}") from error


def _shards(folder: Path, name: str) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of each weight file, by file name; `name` is the model's, for errors."""
    try:
        paths = {file: model_file(folder, file) for file in _weight_files(folder)}
    except FileNotFoundError as error:
        raise ModelError(
            f"{name!r}: {error}; its weights have to be in safetensors, as save_pretrained writes "
            "them."
        ) from None
    return {file: tensors_of(path) for file, path in paths.items()}


def _weight_files(folder: Path) -> list[str]:
    """The names of the weight files, from the index where there is one.

    Raises:
        ModelError: the index is damaged, or names files elsewhere.
    """
    if not (folder / INDEX).exists():
        return [SINGLE]
    index = model_file(folder, INDEX)
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} holds no weight_map: {error!r}") from error
    if not are_plain_names(names) or not all(each.endswith(".safetensors") for each in names):
        raise ModelError(
            f"{folder / INDEX}: its weight_map must hold plain names of .safetensors files that "
            "lie beside it."
        )
    return sorted(set(names))


def _kind(module: nn.Module) -> str:
    """The kind of a module, as `Base.kinds` says."""
    kinds = {nn.Linear: "linear", Conv1D: "transposed", nn.Embedding: "embedding"}
    matches = (kind for cls, kind in kinds.items() if isinstance(module, cls))
    return next(matches, type(module).__name__)


def _modules_in_4bit(model: PreTrainedModel) -> frozenset[str]:
    """The names of the modules that transformers loads in 4 bits; replaces them in `model`."""
    import bitsandbytes as bnb

    replace_with_bnb_linear(
        model,
        modules_to_not_convert=[
            *get_keys_to_not_convert(model),
            *(model._keep_in_fp32_modules or ()),
        ],
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    return frozenset(
        name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    )

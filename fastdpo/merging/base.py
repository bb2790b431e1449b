"""The base of a merge: its files, and what its modules are, without its weights in memory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from fastdpo.merging.tensor_files import StoredTensor, tensors_of
from fastdpo.modeling.loading import HUB_HINT, ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Base:
    """A model's folder.

    Attributes:
        name: as the user named it.
        folder: where its files lie.
        config: its config.json.
        shards: file name -> its tensors, in their order.
        kinds: module -> "linear", "transposed" (weight is (in, out)), "embedding" or the class.
        in_4bit: modules that `--qlora` holds in 4 bits.
        tied: tensor -> the one it is tied to, by the names in memory.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, StoredTensor]]
    kinds: Mapping[str, str]
    in_4bit: frozenset[str]
    tied: Mapping[str, str]

    def stored_name(self, name: str) -> str | None:
        """What the files call a tensor; some leave the first part of its name out."""
        stored = {each for tensors in self.shards.values() for each in tensors}
        parts = name.split(".")
        return next(
            (end for i in range(len(parts)) if (end := ".".join(parts[i:])) in stored), None
        )

    def shard_of(self, stored_name: str) -> str:
        """The file that holds the tensor."""
        return next(shard for shard, tensors in self.shards.items() if stored_name in tensors)


def find_base(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Base:
    """Find a model's files and learn its modules, in a folder or on the hub.

    Raises:
        ModelError: it is not there, not in safetensors, or its weights are quantized already.
    """
    folder = Path(name) if Path(name).is_dir() else _from_hub(name, revision)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code),
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot tell what {name!r} is made of: {error}") from error
    kinds = {module_name: _kind(module) for module_name, module in model.named_modules()}
    tied = dict(model.all_tied_weights_keys)
    return Base(name, folder, config, shards, kinds, _modules_in_4bit(model), tied)


def _from_hub(name: str, revision: str) -> Path:
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
    files = [SINGLE]
    if (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ModelError(
            f"{name!r} has no {missing[0]}: its weights have to be in safetensors, as "
            "save_pretrained writes them."
        )
    return {file: tensors_of(folder / file) for file in files}


def _kind(module: nn.Module) -> str:
    kinds = {nn.Linear: "linear", Conv1D: "transposed", nn.Embedding: "embedding"}
    found = (kind for cls, kind in kinds.items() if isinstance(module, cls))
    return next(found, type(module).__name__)


def _modules_in_4bit(model: PreTrainedModel) -> frozenset[str]:
    """What transformers makes 4-bit layers of; replaces the layers of `model`."""
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

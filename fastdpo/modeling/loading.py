"""Models and tokenizers from a folder or the hub, dense or in 4 bits, with explicit dtypes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastdpo.modeling.base_weights import weights_to_host
from fastdpo.modeling.multimodal import auto_class
from fastdpo.modeling.nf4 import nf4_bytes
from fastdpo.modeling.weight_hash import record_load, weight_files
from fastdpo.system.device import compute_device, cuda_has_bf16, free_device_bytes
from fastdpo.system.oom import oom_message

HUB_HINT = (
    "Pass a local folder that holds config.json, *.safetensors and the tokenizer, or make the hub "
    "reachable (gated models need `hf auth login` and their licence accepted)."
)
DAMAGED_HINT = (
    "A file is damaged, was not downloaded to its end, or belongs to another model or version: "
    "copy or download the folder again."
)
_WHERE = (
    "revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder",
    "code_revision", "force_download", "proxies",
)  # fmt: skip
"""Arguments of `from_pretrained` that say where a config lies."""

GPU_SHARE = 0.9
"""Share of the free memory of a GPU that weights may take to be said to fit there."""

_LAYER = re.compile(r"(?P<stack>.+?)\.(?P<index>\d+)\.(?P<rest>.+)")


class ModelError(ValueError):
    """A model or tokenizer cannot be loaded; the message says what to pass instead."""


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of this name; `auto` is bfloat16 on a GPU with units for it, else float32."""
    if name == "auto":
        return torch.bfloat16 if cuda_has_bf16() else torch.float32
    return getattr(torch, name)


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    load_in_4bit: bool = False,
    base_weights: str = "gpu",
    revision: str = "main",
    trust_remote_code: bool = False,
    options: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal LM onto the GPU if there is one, and note the files that its tensors are from.

    A model that sees or hears is loaded as a whole.

    Args:
        name: folder or hub id.
        dtype: of everything that is not 4-bit: embeddings, norms and head too.
        load_in_4bit: NF4 with double quantization; weights that are stored in 4 bits by
            bitsandbytes stay as they are, with and without it.
        base_weights: gpu; or host, which freezes the decoder layers' matrices and serves them from
            host memory (`HostWeights`), into whose blocks they are read layer by layer; or auto:
            host where the weights do not fit into the GPU's free memory. On the host they are
            quantized by the GPU where 4-bit weights fit there, else by the CPU.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that the repository brings.
        options: more arguments for `from_pretrained`; they win over the above.

    Raises:
        ModelError: the model cannot be found or reached, its files are damaged, incomplete or not
            those of its config, or it is stored quantized in another way than `load_in_4bit` asks
            for; says what to pass instead.
        ImportError: a package is missing that this model needs.
        MemoryError: it does not fit into memory.
    """
    device = compute_device()
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }
    if load_in_4bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    arguments |= options or {}
    with _explaining(f"the model {name!r}"):
        files = weight_files(Path(name))
        where = {option: arguments[option] for option in _WHERE if option in arguments}
        config = arguments.get("config") or AutoConfig.from_pretrained(name, **where)
        quantized = "quantization_config" in arguments or hasattr(config, "quantization_config")
        fits = base_weights == "gpu" or _fits(config, dtype, quantized, device)
        on_host = base_weights == "host" or not fits
        through_gpu = fits and (quantized or not on_host)
        place = device.index if through_gpu and device.type == "cuda" else "cpu"
        arguments.setdefault("device_map", {"": place})
        model, found = auto_class(config).from_pretrained(
            name, output_loading_info=True, **arguments
        )
    _check_complete(name, model, found)
    if load_in_4bit and not getattr(model, "is_loaded_in_4bit", False):
        stored = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        method = getattr(stored, "quant_method", None)
        raise ModelError(
            f"{name!r} is stored quantized ({getattr(method, 'value', method)}), and not in 4 bits "
            "by bitsandbytes: choose the repository that it was made from, or leave 4-bit loading "
            "out (--lora in place of --qlora)."
        )
    if on_host:
        weights_to_host(model, device)
    record_load(model, name, files, arguments)
    return model


def _fits(
    config: PreTrainedConfig, dtype: torch.dtype, in_4bit: bool, device: torch.device
) -> bool:
    """Tell whether a model's weights fit into what is free on the device; on a CPU they do."""
    free = free_device_bytes(device)
    if free is None:
        return True
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    head = model.get_output_embeddings()
    size = 0
    for module in model.modules():
        entries = sum(each.numel() for each in module.parameters(recurse=False))
        packed = in_4bit and isinstance(module, nn.Linear) and module is not head
        size += nf4_bytes(entries) if packed else entries * dtype.itemsize
    return size <= GPU_SHARE * free


def load_tokenizer(
    name: str, *, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Raises:
        ModelError: it cannot be found or reached, or its files are damaged; says what to pass
            instead.
        ImportError: a package is missing that this tokenizer needs.
    """
    with _explaining(f"the tokenizer of {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    if tokenizer is None:
        raise ModelError(f"the model {name!r} has no tokenizer. {HUB_HINT}")
    return tokenizer


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Turn whatever a library raises about the files of `what` into a ModelError.

    Raises:
        ModelError: says whether the files are damaged, or cannot be found or reached.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {what}: {_first_line(error)} {HUB_HINT}") from error
    except BaseException as error:  # each library has errors of its own
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if isinstance(error, RuntimeError) and oom_message(error):
            raise
        raise ModelError(
            f"cannot load {what}: {type(error).__name__}: {_first_line(error)} {DAMAGED_HINT}"
        ) from error


def _check_complete(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse weights that are not those of the config, about which transformers only warns.

    Raises:
        ModelError: tensors are missing, which would be drawn at random, or whole layers are left.
    """
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"cannot load the model {name!r}: its files lack {missing[0]} ({len(missing)} such "
            f"tensors), which would be drawn at random. {DAMAGED_HINT}"
        )
    layers: dict[tuple[str, int], set[str]] = {}
    for key in [*model.state_dict(), *found["unexpected_keys"]]:
        if match := _LAYER.fullmatch(key):
            layers.setdefault((match["stack"], int(match["index"])), set()).add(match["rest"])
    own = {
        (match["stack"], int(match["index"]))
        for key in model.state_dict()
        if (match := _LAYER.fullmatch(key))
    }
    for (stack, index), parts in layers.items():
        if (stack, index) not in own and parts == layers.get((stack, 0)):
            raise ModelError(
                f"cannot load the model {name!r}: its files hold {stack}.{index}, and its config "
                f"counts fewer layers than that. {DAMAGED_HINT}"
            )


def _first_line(error: BaseException) -> str:
    """The first sentence of a library's message, without the list that may follow."""
    text = str(error).strip().splitlines()
    first = text[0].rstrip() if text else type(error).__name__
    if first.endswith("from one of:"):  # transformers, where there is no tokenizer file
        return "no tokenizer file lies there."
    return first

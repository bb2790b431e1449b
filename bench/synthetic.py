"""Random-weight models of any config, in 4 bits or dense, built tensor by tensor.

Benches of 7B shapes need no download, and no more memory than the finished model and its largest
dense matrix: the skeleton lies on the meta device, and each weight is drawn, quantized and put in
its place before the next one is.
"""

import json
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

from bench.harness import SEED
from fastdpo.options import MODEL_ALIASES

STANDARD_DEVIATION = 0.02


def aliased_config(alias: str, **changes: Any) -> PreTrainedConfig:
    """The config of one of `MODEL_ALIASES` as it is bundled, with some values changed."""
    name = f"{MODEL_ALIASES[alias].replace('/', '--')}.json"
    text = (resources.files("fastdpo.planner") / "model_configs" / name).read_text(encoding="utf-8")
    return AutoConfig.for_model(**json.loads(text) | changes)


def random_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: str, load_in_4bit: bool
) -> PreTrainedModel:
    """A causal LM with random weights, as `from_pretrained` would have handed it over.

    Args:
        config: of any causal LM that transformers has; not changed.
        dtype: of everything that is not 4-bit.
        device: where it is built and stays.
        load_in_4bit: NF4 with double quantization for the linear layers but the head.
    """
    config = config.__class__.from_dict(config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if load_in_4bit:
        quantizer = AutoHfQuantizer.from_config(
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
            pre_quantized=False,
        )
        quantizer.preprocess_model(model, device_map={"": device})
        model.hf_quantizer = quantizer
    draw = torch.Generator(device=device).manual_seed(SEED)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    for module in model.modules():
        if not (tied and module is head):
            _fill(module, dtype, device, draw)
    model.tie_weights()
    if load_in_4bit:
        quantizer.postprocess_model(model)
    return model.eval()


def _fill(module: nn.Module, dtype: torch.dtype, device: str, draw: torch.Generator) -> None:
    """Draw the parameters that the module itself holds, and compute its buffers anew."""
    import bitsandbytes as bnb

    for name, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.is_meta:
            continue
        if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
            shape = (module.out_features, module.in_features)
            drawn = _normal(shape, dtype, device, draw)
            module.weight = bnb.nn.Params4bit(
                drawn, requires_grad=False, quant_type="nf4", compress_statistics=True,
                module=module,
            ).to(device)  # fmt: skip
            continue
        value = _normal(tuple(parameter.shape), dtype, device, draw)
        if parameter.ndim == 1:  # norms near one (near zero in Gemma, whose norms add it), biases
            ones = "norm" in type(module).__name__.lower() and "Gemma" not in type(module).__name__
            value += 1.0 if ones else 0.0
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
        _rebuild_buffers(module, device)


def _normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, draw: torch.Generator
) -> Tensor:
    drawn = torch.empty(shape, dtype=dtype, device=device)
    return drawn.normal_(0.0, STANDARD_DEVIATION, generator=draw)


def _rebuild_buffers(module: nn.Module, device: str) -> None:
    """Buffers are functions of the config: those of a module made anew are the right ones.

    Raises:
        ValueError: the module is not made from a config alone, so its buffers are not known.
    """
    config = getattr(module, "config", None)
    if config is None:
        shapes = {name: tuple(b.shape) for name, b in module.named_buffers(recurse=False)}
        if list(shapes) == ["embed_scale"]:  # Gemma's embeddings
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
            return
        raise ValueError(
            f"{type(module).__name__} has buffers {shapes} that are made from no config: teach "
            "bench/synthetic.py how, or choose another model."
        )
    with torch.device(device):
        fresh = type(module)(config)
    for name, buffer in fresh.named_buffers(recurse=False):
        setattr(module, name, buffer)

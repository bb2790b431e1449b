"""The sizes of a model, from its config alone: layers, linear layers, heads, vocabulary.

The model is built on the meta device, where tensors have shapes and no bytes, and counted; so any
family that transformers knows is counted right, and a loaded model is read in the same way.
"""

import json
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from fastdpo.modeling.activations import decoder_layers, supports_checkpointing
from fastdpo.modeling.attention_backends import AttentionNeeds, attention_needs
from fastdpo.modeling.base_weights import named_weights
from fastdpo.modeling.families import (
    Family,
    config_value,
    experts_per_token,
    family_of,
    head_dims,
    is_norm,
)
from fastdpo.modeling.head import get_backbone, unwrap_model
from fastdpo.modeling.multimodal import auto_class, other_towers
from fastdpo.options import MODEL_ALIASES, resolve_model
from fastdpo.planner.states import StateLayers, count_states

CONFIGS = "model_configs"
"""Folder beside this file: config.json values of every aliased model, for planning offline."""


@dataclass(frozen=True)
class LinearShape:
    """A kind of linear layer of the decoder and how often it occurs in the whole model."""

    name: str  # the last part of its name, as target_modules gives it
    inputs: int
    outputs: int
    bias: bool
    count: int

    @property
    def weights(self) -> int:
        """Entries of one weight matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model that its memory depends on.

    Attributes:
        name: the model's name as the user gave it.
        model_type: the family, as transformers names it.
        layers: decoder layers.
        hidden: H.
        intermediate: width of the gated MLP (of the experts that see one token, if there are any).
        query_width: query heads times their size.
        key_width: key heads times their size; values likewise.
        query_heads: heads of queries, each with its softmax statistics.
        head_size: entries of one head, and of the rotary tables.
        vocabulary: V.
        tied: whether embeddings and head are one matrix.
        linears: linear layers below the head, by kind.
        embedding_parameters: entries of the token embeddings.
        other_parameters: entries of everything else: norms, biases, experts held as one tensor.
        norms: norms over H in one layer, of which two feed linear layers.
        query_key_norms: whether queries and keys pass a norm of their own.
        attention: what its attention layers ask of a backend.
        plain_embeddings: whether the embeddings are a look-up and nothing more.
        is_standard: whether a layer is attention and one gated MLP, for which the activation
            formulas are written.
        has_fused_layers: whether `fastdpo_kernels` can compute its norms and MLPs.
        stacked_parameters: entries of `other_parameters` that lie in decoder layers in two
            dimensions or more: experts held as one tensor.
        largest_layer: matrices of the largest decoder layer over those of the mean one.
        tower_bytes: bytes of what it sees or hears with, which lie on the GPU and are not trained.
        states: its layers that carry a state which can be forked; None where there are none.
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    key_width: int
    query_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    linears: tuple[LinearShape, ...]
    embedding_parameters: int
    other_parameters: int
    norms: int
    query_key_norms: bool
    attention: AttentionNeeds
    plain_embeddings: bool
    is_standard: bool
    has_fused_layers: bool
    stacked_parameters: int = 0
    largest_layer: float = 1.0
    tower_bytes: int = 0
    states: StateLayers | None = None

    @property
    def linear_parameters(self) -> int:
        """Entries of all weight matrices below the head."""
        return sum(linear.weights * linear.count for linear in self.linears)

    @property
    def mlp_parameters(self) -> int:
        """Entries of all weight matrices of MLPs."""
        return sum(
            linear.weights * linear.count
            for linear in self.linears
            if self.intermediate in (linear.inputs, linear.outputs)
        )

    @property
    def head_parameters(self) -> int:
        """Entries of the head where it is a matrix of its own."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Entries of the whole model, a tied matrix counted once."""
        return (
            self.linear_parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.other_parameters
        )

    def targets(self, target_modules: tuple[str, ...] | None) -> tuple[LinearShape, ...]:
        """The linear layers that get an adapter; None: all of them.

        Raises:
            ValueError: a name that no linear layer has.
        """
        if target_modules is None:
            return self.linears
        known = sorted({linear.name for linear in self.linears})
        for name in target_modules:
            if name not in known:
                raise ValueError(
                    f"{self.name} has no linear layer {name!r} to adapt: choose from "
                    f"{', '.join(known)}."
                )
        return tuple(linear for linear in self.linears if linear.name in target_modules)


def architecture_named(
    name: str, *, revision: str = "main", trust_remote_code: bool = False
) -> Architecture:
    """The architecture of a folder, an alias or a hub id, from its config alone.

    Args:
        name: an alias, folder or hub id; the aliases need no network.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that the repository brings.

    Raises:
        ValueError: there is no such config, or it is of no causal LM.
    """
    repository, _ = resolve_model(name)
    bundled = resources.files("fastdpo.planner") / CONFIGS / f"{repository.replace('/', '--')}.json"
    try:
        if bundled.is_file() and not Path(repository).is_dir():
            config = AutoConfig.for_model(**json.loads(bundled.read_text(encoding="utf-8")))
        else:
            config = AutoConfig.from_pretrained(
                repository, revision=revision, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"there is no config of the model {name!r}: {reason} Pass a folder with config.json, "
            f"one of the aliases {', '.join(MODEL_ALIASES)}, or make the hub reachable."
        ) from error
    return architecture_of_config(config, name, trust_remote_code=trust_remote_code)


def architecture_of_config(
    config: PreTrainedConfig, name: str, *, trust_remote_code: bool = False
) -> Architecture:
    """Build the config's model on the meta device and count it.

    Raises:
        ValueError: the config is of no causal LM with a stack of decoder layers.
    """
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{name} is a {config.model_type!r} model, not a causal LM: choose one that "
            "AutoModelForCausalLM or AutoModelForImageTextToText loads."
        ) from error
    return architecture_of(model, name)


_UNCOUNTABLE = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError)


class UnplannableError(ValueError):
    """A model that cannot be counted, so that its memory cannot be planned."""


def architecture_of(model: nn.Module, name: str) -> Architecture:
    """Count a causal LM, on the meta device or loaded, dense or 4-bit, without adapters or with.

    What a config does not say is taken from the modules: of families that are not attention and
    one gated MLP a layer's inside is a guess, and `is_standard` says so.

    Raises:
        UnplannableError: it has no stack of decoder layers, or no field or module of the usual
            names.
    """
    try:
        return _counted(unwrap_model(model), name)
    except _UNCOUNTABLE as error:
        raise UnplannableError(
            f"the memory of {name} cannot be planned ({type(error).__name__}: {error}). Pass "
            "--micro_batch_tokens yourself."
        ) from error


def _counted(causal_lm: Any, name: str) -> Architecture:
    decoder, config = get_backbone(causal_lm), causal_lm.config.get_text_config()
    layers = _layers(causal_lm)
    embeddings, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    tied = head is None or head.weight is embeddings.weight
    tied = tied or bool(getattr(config, "tie_word_embeddings", False))
    linears = _linears(decoder)
    counted = {id(embeddings.weight)} | ({id(head.weight)} if head is not None else set())
    adapted = adapted_modules(causal_lm)
    towers = [causal_lm.get_submodule(path) for path in other_towers(causal_lm)]
    in_towers = {parameter for tower in towers for parameter in tower.parameters()}
    other = sum(
        parameter.numel()
        for path, parameter in named_weights(causal_lm)
        if id(parameter) not in counted
        and parameter not in in_towers
        and not is_of_adapter(path, adapted)
        and not _is_linear(causal_lm, path)
    )
    layer = max(layers, key=lambda each: sum(linear.weights for linear in _linears(each)))
    shapes = {linear.name: linear for linear in _linears(layer)}
    stacked = [_stacked(each) for each in layers]
    matrices = [
        sum(linear.weights * linear.count for linear in _linears(each)) + more
        for each, more in zip(layers, stacked, strict=True)
    ]
    family = family_of(config)
    head_size, _ = head_dims(config)
    hidden = getattr(config, "hidden_size", None) or embeddings.weight.shape[1]
    norms = [_width(module) for module in layer.modules() if is_norm(module, family)]
    weights = sum(linear.weights for linear in shapes.values())
    standard = {*family.attention_linears, *family.gated_mlps[0]}
    heads = config_value(config, "num_attention_heads") or 0
    key_heads = config_value(config, "num_key_value_heads") or heads
    return Architecture(
        name=name,
        model_type=config.model_type,
        layers=len(layers),
        hidden=hidden,
        intermediate=_intermediate(config, family, shapes),
        query_width=heads * head_size,
        key_width=key_heads * head_size,
        query_heads=heads,
        head_size=head_size,
        vocabulary=embeddings.weight.shape[0],
        tied=tied,
        linears=linears,
        embedding_parameters=embeddings.weight.numel(),
        other_parameters=other,
        stacked_parameters=sum(stacked),
        largest_layer=max(matrices) * len(matrices) / max(1, sum(matrices)),
        tower_bytes=sum(parameter.nbytes for parameter in in_towers),
        states=count_states(decoder, config),
        norms=max(2, sum(width == hidden for width in norms)),
        query_key_norms=any(width != hidden for width in norms),
        attention=attention_needs(config),
        plain_embeddings=type(embeddings).__name__ in ("Embedding", "HostEmbedding"),
        is_standard=set(shapes) == standard and other < weights,
        has_fused_layers=family.fused is not None
        and any(k.__name__ == f"{family.fused.prefix}DecoderLayer" for k in type(layer).__mro__),
    )


def _stacked(layer: nn.Module) -> int:
    """Entries of a layer's own matrices that are of no linear layer: experts held as one tensor."""
    adapted = adapted_modules(layer)
    return sum(
        weight.numel()
        for path, weight in named_weights(layer)
        if weight.ndim >= 2 and not is_of_adapter(path, adapted) and not _is_linear(layer, path)
    )


def _layers(causal_lm: Any) -> list[nn.Module]:
    """The repeated layers: those that an activation plan is for, else the longest list of modules.

    Raises:
        LookupError: there are none.
    """
    if supports_checkpointing(causal_lm):
        return decoder_layers(causal_lm)
    stacks = [m for m in get_backbone(causal_lm).modules() if isinstance(m, nn.ModuleList)]
    if not any(len(stack) for stack in stacks):
        raise LookupError("it has no stack of layers")
    return list(max(stacks, key=len))


def adapted_modules(module: nn.Module) -> set[str]:
    """The paths of modules that PEFT has wrapped; the base's own module lies in `base_layer`."""
    return {path for path, part in module.named_modules() if hasattr(part, "base_layer")}


def is_of_adapter(path: str, adapted: set[str]) -> bool:
    """Tell whether a module or parameter inside a wrapped module is the adapter's."""
    parts = path.split(".")
    return any(
        ".".join(parts[:depth]) in adapted and parts[depth] != "base_layer"
        for depth in range(1, len(parts))
    )


def _linears(module: nn.Module) -> tuple[LinearShape, ...]:
    counts: Counter[tuple[str, int, int, bool]] = Counter()
    adapted = adapted_modules(module)
    for path, part in module.named_modules():
        if isinstance(part, _LINEAR) and not is_of_adapter(path, adapted):
            name = path.removesuffix(".base_layer").rpartition(".")[2]
            counts[name, *_shape(part), part.bias is not None] += 1
    return tuple(LinearShape(*kind, count) for kind, count in counts.items())


_LINEAR = (nn.Linear, Conv1D)  # a 4-bit one is a Linear too; Conv1D is GPT-2's


def _shape(linear: Any) -> tuple[int, int]:
    """Inputs and outputs."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.nx, linear.nf


def _is_linear(model: nn.Module, path: str) -> bool:
    """Tell whether a parameter is the weight matrix of a linear layer (its bias is not)."""
    owner, _, name = path.rpartition(".")
    return name == "weight" and isinstance(model.get_submodule(owner), _LINEAR)


def _width(norm: Any) -> int:
    return norm.weight.numel()


def _intermediate(config: Any, family: Family, shapes: dict[str, LinearShape]) -> int:
    """Values of the MLP's widest inner tensor per token."""
    experts = experts_per_token(config)
    down = next((names[-1] for names in family.gated_mlps if names[-1] in shapes), None)
    if down is not None and not experts:
        return shapes[down].inputs
    width = config_value(config, "moe_intermediate_size") or config_value(
        config, "intermediate_size"
    )
    if not isinstance(width, int):
        width = max((max(each.inputs, each.outputs) for each in shapes.values()), default=0)
    return width * (experts or 1)

"""The layers of the families in the table, computed by the ops of `fastdpo_kernels`.

`use_kernels` changes the class of a model's own norms, MLPs, attentions and decoder layers to a
subclass that is made of it, as `replace_lora_forward` does for LoRA layers; nothing of transformers
is patched, and modules that the table does not know stay as they are. A module of such a subclass
runs the fused op while its `backend` is set and transformers' forward otherwise.

    decoder layer      the residual sum in one pass with the norm after it
    attention          transformers' own code with its rotary embedding replaced; norms of queries
                       and keys are folded into that, their modules hand on what they are given
    MLP                act(gate) * up, whose gradients are written over gate and up, in one node
                       with the LoRA layer down
    q, k, v; gate, up  adapters stacked, in `SharedInput`
"""

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any

from fastdpo_kernels import (
    gated_activation,
    gated_lora_linear,
    missing_for_triton,
    rms_norm,
    rotary,
)
from torch import Tensor, nn

from fastdpo.modeling.families import FusedForms, family_of
from fastdpo.modeling.head import get_backbone, unwrap_model
from fastdpo.modeling.rebinding import with_globals
from fastdpo.modeling.shared_input import SharedInput

logger = logging.getLogger(__name__)

ACTIVATION_KINDS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}
"""Kind of `gated_activation` by the class of transformers' or torch's activation."""

TRANSFORMERS = "transformers.models."
"""How the modules begin whose classes are those of the table; remote code has others."""

ROTARY_FUNCTION = "apply_rotary_pos_emb"
"""Name by which every attention of the table calls its rotary embedding."""


class FusedModule:
    """A module that can run a fused op.

    Attributes:
        backend: of the op, as `fastdpo_kernels` takes it; None runs the module's own forward.
        forms: how the op computes what the module does.
        shared_input: the LoRA layers in it whose adapters are stacked, or None.
    """

    backend: str | None = None
    forms: FusedForms
    shared_input: SharedInput | None = None


class _Norm(FusedModule):
    folded = False

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if self.backend is None:
            return super().forward(hidden_states)  # pyrefly: ignore
        if self.folded:
            return hidden_states
        return rms_norm(
            hidden_states,
            self.weight,
            eps=_eps(self),
            form=self.forms.norm,
            centered=self.forms.centered,
            backend=self.backend,
        )


class _MLP(FusedModule):
    kind: str  # of its activation

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if self.backend is None:
            return super().forward(hidden_states)  # pyrefly: ignore
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(hidden_states), None
        else:
            gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        # Nothing else reads what the projections return.
        options = {"kind": self.kind, "overwrite": True, "backend": self.backend}
        down: Any = self.down_proj
        hooked = down._forward_hooks or down._forward_pre_hooks
        plain = None if hooked or not hasattr(down, "plain_lora") else down.plain_lora(gate)
        if plain is None:
            return down(gated_activation(gate, up, **options))
        return gated_lora_linear(gate, up, plain[0], dropout=plain[1], **options)


class _Attention(FusedModule):
    @property
    def projects_apart(self: Any) -> bool:
        """Tells whether queries and keys are layers' results that nothing else reads.

        Those of one projection share their memory with the values, and a norm may have saved its
        output.
        """
        q_norm = getattr(self, "q_norm", None)
        return hasattr(self, "q_proj") and (q_norm is None or getattr(q_norm, "folded", False))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.backend is None:
            return super().forward(*args, **kwargs)  # pyrefly: ignore
        try:
            return with_globals(_own_forward(type(self)), {ROTARY_FUNCTION: self.turn})(
                self, *args, **kwargs
            )
        finally:
            if self.shared_input is not None:
                self.shared_input.forget()

    def turn(
        self: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Stands in for `apply_rotary_pos_emb`; attention alone reads what it returns."""
        assert unsqueeze_dim == 1, "heads before tokens in every family of the table"
        options: dict[str, Any] = {}
        norms: list[Any] = [getattr(self, name, None) for name in ("q_norm", "k_norm")]
        if all(isinstance(norm, _Norm) and norm.folded for norm in norms):
            options = {
                "q_weight": norms[0].weight,
                "k_weight": norms[1].weight,
                "eps": _eps(norms[0]),
                "form": self.forms.norm,
            }
        interleaved = self.forms.interleaved
        return rotary(
            query,
            key,
            cos,
            sin,
            interleaved=interleaved,
            upcast=interleaved,
            in_place=self.projects_apart,
            backend=self.backend,
            **options,
        )


class _DecoderLayer(FusedModule):
    def forward(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        norm: Any = getattr(self, self.forms.norm_after_sum, None)
        if self.backend is None or args or norm is None or not runs_fused(norm):
            return super().forward(hidden_states, *args, **options)  # pyrefly: ignore
        residual = hidden_states
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(residual), **options)
        for name in self.forms.after_attention:
            attended = getattr(self, name)(attended)
        if attended.dtype == residual.dtype:
            hidden_states, residual = rms_norm(
                attended,
                norm.weight,
                eps=_eps(norm),
                residual=residual,
                form=self.forms.norm,
                centered=self.forms.centered,
                backend=self.backend,
            )
        else:  # under autocast the residual stream is wider
            residual = residual + attended
            hidden_states = norm(residual)
        hidden_states = self.mlp(hidden_states)
        for name in self.forms.after_mlp:
            hidden_states = getattr(self, name)(hidden_states)
        return residual + hidden_states


def runs_fused(module: nn.Module) -> bool:
    """Tell whether a module runs a fused op now, in place of its own forward."""
    return isinstance(module, FusedModule) and module.backend is not None


def kernels_of(model: nn.Module) -> str:
    """`fused` if any layer of a model runs a fused op, else `eager`."""
    return "fused" if any(map(runs_fused, unwrap_model(model).modules())) else "eager"


def choose_kernels(model: nn.Module, requested: str) -> str:
    """Choose `fused` or `eager` for a model, by `--kernels`.

    Args:
        model: a causal LM or a PeftModel on it.
        requested: auto, fused or eager. auto is fused where the Triton kernels run: on the CPU it
            gains nothing, and tiny models lose; an older GPU would run the slower torch twins.
    """
    if requested != "auto":
        return requested
    like = next(unwrap_model(model).parameters())
    fits = like.is_cuda and missing_for_triton(like) is None
    return "fused" if fits else "eager"


def use_kernels(model: nn.Module, requested: str = "auto", *, backend: str = "auto") -> None:
    """Let the layers of a model run fused ops or transformers' own modules, in place.

    May be called again, with another choice as well; call it after adapters are added.

    Args:
        model: a causal LM or a PeftModel on it.
        requested: auto, fused or eager, as `choose_kernels` takes it.
        backend: of the ops.
    """
    modules = list(get_backbone(model).modules())
    before = kernels_of(model)
    for module in modules:
        if isinstance(module, FusedModule):
            _release(module)
    if choose_kernels(model, requested) == "eager":
        return
    config = unwrap_model(model).config.get_text_config()
    forms = family_of(config).fused
    fused: Counter[str] = Counter()
    own = [f"{config.model_type} is not in the table of families"]
    if forms is not None:
        fused, own = _attach_all(modules, forms, backend)
    if before == "eager":
        _log(fused, own, requested)


def _attach_all(
    modules: list[nn.Module], forms: FusedForms, backend: str
) -> tuple[Counter[str], list[str]]:
    """Make modules run their fused ops; how many of each kind do, and why others do not."""
    fused: Counter[str] = Counter()
    own: dict[str, None] = {}  # reasons, in order
    for name, mixin in _CLASSES.items():
        wanted = forms.prefix + (name or forms.norm_class)
        for module in modules:
            if _class_name(module) != wanted:
                continue
            if reason := _attach(module, mixin, forms, backend):
                own[f"{wanted}: {reason}"] = None
            else:
                fused[_WORDS[mixin]] += 1
    groups = [m.shared_input for m in modules if isinstance(m, FusedModule) and m.shared_input]
    fused["LoRA layers stacked"] = sum(len(group.layers) for group in groups)
    return fused, list(own)


def _log(fused: Counter[str], own: list[str], requested: str) -> None:
    parts = [f"{count} {what}" for what, count in fused.items() if count]
    level = logging.WARNING if requested == "fused" and not parts else logging.INFO
    logger.log(
        level,
        "Fused in the layers: %s. As transformers computes it: %s.",
        ", ".join(parts) or "nothing",
        "; ".join(own) or "everything else",
    )


_CLASSES: dict[str, type[FusedModule]] = {
    "": _Norm,
    "MLP": _MLP,
    "Attention": _Attention,
    "DecoderLayer": _DecoderLayer,
}
"""The mixin of a class of transformers, by its name less the family's prefix; "" is the norm.

Norms come first, since attentions and layers look at theirs.
"""

_WORDS: dict[type[FusedModule], str] = {
    _Norm: "norms",
    _MLP: "MLPs",
    _Attention: "rotary embeddings",
    _DecoderLayer: "residual sums with the norm after them",
}


def _class_name(module: nn.Module) -> str:
    """The name of the module's class in transformers, ours on top of it left out."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith(TRANSFORMERS):
            return kind.__name__
        if kind.__module__.split(".")[0] != "fastdpo":
            return ""
    return ""


def _attach(module: Any, mixin: type[FusedModule], forms: FusedForms, backend: str) -> str:
    """Make a module run its fused op; the reason why not, or nothing."""
    if "forward" in vars(module):
        return "its forward has been replaced"
    if reason := _OBSTACLES[mixin](module, forms):
        return reason
    if not isinstance(module, FusedModule):
        module.__class__ = _fused(mixin, type(module))
    module.forms, module.backend = forms, backend
    if mixin is _MLP:
        module.kind = _activation_kind(module)
        module.shared_input = _shared(module, ("gate_proj", "up_proj"))
    if mixin is _Attention:
        for name in ("q_norm", "k_norm"):
            if isinstance(norm := getattr(module, name, None), _Norm):
                norm.folded = not forms.interleaved
        module.shared_input = _shared(module, ("q_proj", "k_proj", "v_proj"))
    return ""


def _release(module: Any) -> None:
    """Give a module its own forward back."""
    module.backend = None
    if isinstance(module, _Norm):
        module.folded = False
    if module.shared_input is not None:
        for layer in module.shared_input.layers:
            layer.shared_input = None
        module.shared_input = None


def _norm_obstacle(module: Any, forms: FusedForms) -> str:
    return "" if module.weight.ndim == 1 else "it has a weight for each head"


def _mlp_obstacle(module: Any, forms: FusedForms) -> str:
    if _activation_kind(module) is None:
        return f"its activation is {type(_activation(module)).__name__}"
    return ""


def _attention_obstacle(module: Any, forms: FusedForms) -> str:
    own = inspect.unwrap(type(module).forward)
    if isinstance(module, FusedModule):
        own = _own_forward(type(module))
    if ROTARY_FUNCTION not in own.__code__.co_names:
        return f"it does not call {ROTARY_FUNCTION}"
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if any(norm is not None and not isinstance(norm, _Norm) for norm in norms):
        # They run on their own before the rotary embedding, which is exact too.
        return "" if forms.interleaved else "the norms of its queries and keys are not plain"
    return ""


def _layer_obstacle(module: Any, forms: FusedForms) -> str:
    if not forms.norm_after_sum:
        return "no norm reads the residual sum in the middle"
    if not runs_fused(getattr(module, forms.norm_after_sum)):
        return f"{forms.norm_after_sum} is not plain"
    return ""


_OBSTACLES: dict[type[FusedModule], Callable[[Any, FusedForms], str]] = {
    _Norm: _norm_obstacle,
    _MLP: _mlp_obstacle,
    _Attention: _attention_obstacle,
    _DecoderLayer: _layer_obstacle,
}


def _shared(module: Any, names: tuple[str, ...]) -> SharedInput | None:
    """Stack the LoRA layers of these names, where there are two or more of them."""
    layers: list[Any] = [getattr(module, name, None) for name in names]
    layers = [layer for layer in layers if hasattr(layer, "plain_lora")]
    if len(layers) < 2:
        return None
    shared = SharedInput(layers)
    for layer in layers:
        layer.shared_input = shared
    return shared


def _activation(mlp: Any) -> Any:
    return getattr(mlp, "act_fn", None) or mlp.activation_fn


def _activation_kind(mlp: Any) -> str | None:
    activation = _activation(mlp)
    if inspect.ismethod(getattr(activation, "act", None)):
        return None  # transformers' formula in Python, which rounds elsewhere
    return ACTIVATION_KINDS.get(type(activation).__name__)


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


@functools.cache
def _fused(mixin: type[FusedModule], kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class of transformers; of one that runs it in tiles, below the tiles."""
    if not kind.__module__.startswith(TRANSFORMERS):
        outer, inner = kind.__bases__
        return type(kind.__name__, (outer, _fused(mixin, inner)), {"__module__": kind.__module__})
    return type(f"Fused{kind.__name__}", (mixin, kind), {"__module__": __name__})


@functools.cache
def _own_forward(kind: type[nn.Module]) -> FunctionType:
    """The forward that a class of ours is put on."""
    beneath = next(c for c in kind.__mro__ if c.__module__.startswith(TRANSFORMERS))
    own: Any = inspect.unwrap(beneath.forward)  # pyrefly: ignore
    return own

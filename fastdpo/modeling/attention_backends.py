"""The attention backends: what each can do, what it keeps, and which one a run gets.

One table and one choice for the passes, the planner and `python -m fastdpo.plan`. A new backend is
an entry here, its name in `ATTENTION_BACKENDS` of the options, and the file of its kernel. Nothing
here imports a kernel or model code.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastdpo.modeling.families import attention_softcap, family_of, head_dims

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_ATTENTION = "own"
"""Stands for one of `ATTENTIONS` where a model's own attention stays: in padded sequences."""

CPU_ATTENTION_KEY = "sdpa-per-segment"
"""Names the attention on the CPU in the reference store's key, see `attention_kind`."""

Capability = tuple[int, int]
"""CUDA compute capability, (major, minor)."""


@dataclass(frozen=True)
class AttentionNeeds:
    """The features of an attention layer that decide which backends can compute it.

    Attributes:
        head_dim: entries of one head's queries and keys.
        value_dim: entries of one head's values.
        softcap: whether scores are capped.
        sinks: whether heads have sinks.
        dropout: whether weights are dropped.
        packed: whether there are segments; without, sequences are padded ones.
    """

    head_dim: int
    value_dim: int
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    packed: bool = True


@dataclass(frozen=True)
class Backend:
    """One way to attend over packed sequences.

    Attributes:
        interface_name: its name in transformers' AttentionInterface, where "flash" has a meaning.
        kernel: module below `fastdpo.modeling.attention` and function in it: "flex.attend_flex".
        requires: module that must be installed; empty: nothing.
        on_cpu: whether it runs without a GPU.
        capability: compute capability from which on it runs.
        half_only: whether it takes bfloat16 and float16 alone.
        head_dims: sizes of a head that it takes.
        takes_softcap, takes_sinks: whether it can do these.
        takes_all: whether it does everything else too: padded sequences, dropout, and values of
            another size than keys.
        gathers_keys: whether backward keeps the prefix's keys and values once more for every
            further suffix.
        copies_output: whether o_proj reads a copy of its output, which backward keeps beside it.
        keeps_masks: whether masks, and keys and values of further suffixes with their prefix, are
            kept.
        returns_results: whether one kernel returns all that a layer that keeps its attention saves.
        flash_backward: whether its backward holds the queries' gradient in fp32 and, where heads
            share keys and values, their gradients for every query head.
    """

    interface_name: str
    kernel: str
    requires: str = ""
    on_cpu: bool = False
    capability: Capability = (0, 0)
    half_only: bool = False
    head_dims: range = range(1, 2**31)
    takes_softcap: bool = True
    takes_sinks: bool = True
    takes_all: bool = False
    gathers_keys: bool = False
    copies_output: bool = True
    keeps_masks: bool = False
    flash_backward: bool = False
    returns_results: bool = False


_FLASH = {
    "capability": (8, 0), "half_only": True, "head_dims": range(8, 257, 8), "takes_sinks": False,
    "gathers_keys": True, "copies_output": False, "flash_backward": True, "returns_results": True,
}  # fmt: skip
"""The properties that torch's flash kernel and the packages' have in common."""

BACKENDS = {
    "sdpa": Backend(
        "fastdpo_segments", "sdpa.attend_segments", on_cpu=True, takes_all=True, keeps_masks=True
    ),
    "varlen": Backend(
        "fastdpo_varlen", "varlen.attend_torch", "torch.nn.attention.varlen", takes_softcap=False,
        **_FLASH,
    ),
    "flex": Backend("fastdpo_blocks", "flex.attend_flex", "triton", head_dims=range(16, 2**31)),
    "flash_attention_2": Backend("fastdpo_fa2", "varlen.attend_flash_attention_2", **_FLASH),
    "flash_attention_3": Backend("fastdpo_fa3", "varlen.attend_flash_attention_3", **_FLASH),
}  # fmt: skip
"""The backends by the names that `--attention` takes."""

AUTO_ORDER = ("varlen", "flex")
"""The order in which `--attention auto` tries backends; "sdpa", which can do all, comes last."""

ATTENTIONS = {"auto": "fastdpo"} | {name: each.interface_name for name, each in BACKENDS.items()}
"""The values of `--attention`, and their names in transformers' interface."""


class Selected(NamedTuple):
    """The backend that attends, and what spoke against others, for the log."""

    backend: str
    reason: str


def attention_needs(config: "PreTrainedConfig", *, dropout: bool = False) -> AttentionNeeds:
    """The `AttentionNeeds` of a model's layers, by its text config.

    Args:
        config: the text config.
        dropout: whether the run leaves the model's own dropout on.
    """
    rate = getattr(config, "attention_dropout", None) if dropout else None
    softcap = attention_softcap(config)
    return AttentionNeeds(
        *head_dims(config),
        softcap=softcap is not None,
        sinks=family_of(config).attention_sinks,
        dropout=bool(rate),
    )


@cache
def select_backend(
    needs: AttentionNeeds,
    dtype: torch.dtype,
    capability: Capability | None,
    requested: str = "auto",
    *,
    assume_installed: bool = False,
) -> Selected:
    """Choose what attends: one of `BACKENDS`.

    Args:
        needs: of a model by its config, or of one layer by its inputs.
        dtype: of queries, keys and values.
        capability: of the GPU; None on the CPU.
        requested: one of `ATTENTIONS`.
        assume_installed: do not look for the modules that a backend requires: the choice is for
            another machine.

    Raises:
        ValueError: the requested one cannot do it; says what it lacks.
    """

    def lacks(name: str) -> str:
        return _unsupported_reason(name, needs, dtype, capability, assume_installed)

    if requested == "auto":
        reasons: list[str] = []
        for name in AUTO_ORDER:
            if not (reason := lacks(name)):
                return Selected(name, "; ".join(reasons))
            reasons.append(f"{name}: {reason}")
        return Selected("sdpa", "; ".join(reasons))
    reason = lacks(requested)
    if reason and needs.packed:
        raise ValueError(f"--attention {requested} cannot be used here: {reason}. Use auto.")
    return Selected("sdpa", reason) if reason else Selected(requested, "requested")


def why_not_kept(needs: AttentionNeeds, backend: str) -> str:
    """Why a layer that keeps its attention runs it again all the same, or an empty string.

    Args:
        needs: of the layer.
        backend: what attends, one of `BACKENDS`.
    """
    if needs.dropout:
        return "attention dropout is on"
    if BACKENDS[backend].returns_results:
        return ""
    if not BACKENDS[backend].takes_all:
        return f"{backend} does not hand out what it returned"
    features = {"scores are capped": needs.softcap, "attention has sinks": needs.sinks}
    return next((f"{name} and no kernel does that" for name, on in features.items() if on), "")


def _unsupported_reason(
    name: str,
    needs: AttentionNeeds,
    dtype: torch.dtype,
    capability: Capability | None,
    assume_installed: bool,
) -> str:
    """Why a backend cannot compute such a layer, in a few words, or an empty string."""
    backend = BACKENDS[name]
    major, minor = backend.capability
    checks = (
        (needs.packed or backend.takes_all, "sequences are padded"),
        (capability is not None or backend.on_cpu, "not on a CUDA device"),
        (not needs.dropout or backend.takes_all, "attention dropout is on"),
        (
            needs.head_dim == needs.value_dim or backend.takes_all,
            "keys and values have different sizes",
        ),
        (dtype.itemsize == 2 or not backend.half_only, f"dtype is {dtype}"),
        (needs.head_dim in backend.head_dims, f"head size is {needs.head_dim}"),
        (not needs.sinks or backend.takes_sinks, "attention has sinks"),
        (
            capability is None or capability >= backend.capability,
            f"the GPU is older than compute capability {major}.{minor}",
        ),
        (not needs.softcap or backend.takes_softcap, "scores are capped"),
        (
            assume_installed or _is_installed(backend.requires),
            f"{backend.requires} is not installed",
        ),
    )
    return next((reason for holds, reason in checks if not holds), "")


def _is_installed(module: str) -> bool:
    return not module or find_spec(module) is not None


def attention_kind(
    config: "PreTrainedConfig", device: torch.device, attention: str = "auto"
) -> str:
    """A name for what will attend, as far as log-probs depend on it: for the reference store's key.

    On the CPU it is `CPU_ATTENTION_KEY`. On CUDA the kernel may differ from layer to layer, and is
    a function of the config, the dtype and the GPU, all of which the store knows besides.
    """
    if attention == MODEL_ATTENTION:
        return f"own-{config._attn_implementation}"
    if device.type != "cuda" and attention in ("auto", "sdpa"):
        return CPU_ATTENTION_KEY
    return f"{attention}-{device.type}"

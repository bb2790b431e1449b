"""Attention over packed groups: each completion attends to its prompt and to itself."""

from fastdpo.modeling.attention.dispatch import attends_packed, packed_attention
from fastdpo.modeling.attention.segments import PackedSegments
from fastdpo.modeling.attention_backends import (
    ATTENTIONS,
    CPU_ATTENTION_KEY,
    MODEL_ATTENTION,
    attention_kind,
)

__all__ = [
    "ATTENTIONS",
    "CPU_ATTENTION_KEY",
    "MODEL_ATTENTION",
    "PackedSegments",
    "attends_packed",
    "attention_kind",
    "packed_attention",
]

"""Attention over packed groups: each completion attends to its prompt and to itself."""

from fastdpo.modeling.attention.dispatch import (
    ATTENTIONS,
    KIND,
    OWN,
    attends_packed,
    attention_kind,
    packed_attention,
)
from fastdpo.modeling.attention.segments import PackedSegments

__all__ = [
    "ATTENTIONS",
    "KIND",
    "OWN",
    "PackedSegments",
    "attends_packed",
    "attention_kind",
    "packed_attention",
]

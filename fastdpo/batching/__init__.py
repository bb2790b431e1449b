"""Pairs to packed micro-batches: groups, their layout, bin packing, and the order of an epoch."""

from fastdpo.batching.dealing import deal
from fastdpo.batching.groups import (
    PairGroups,
    PromptGroup,
    group_tokens,
    linked,
    lists_of,
    longest_sequence,
    shared_prefix_length,
)
from fastdpo.batching.micro_batch import MicroBatch, Segment
from fastdpo.batching.pack import default_micro_batch_tokens, pack_in_order, pack_update

__all__ = [
    "PromptGroup",
    "MicroBatch",
    "PairGroups",
    "Segment",
    "deal",
    "default_micro_batch_tokens",
    "group_tokens",
    "linked",
    "lists_of",
    "longest_sequence",
    "pack_in_order",
    "pack_update",
    "shared_prefix_length",
]

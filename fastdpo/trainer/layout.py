"""The choice of a run's layout before training, by its options, a memory plan or the device."""

import logging
from dataclasses import dataclass
from functools import reduce

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from fastdpo.batching import (
    PairGroups,
    PromptGroup,
    default_micro_batch_tokens,
    longest_sequence,
    shared_prefix_length,
)
from fastdpo.config import DPOConfig
from fastdpo.modeling.activations import (
    KEEP,
    RECOMPUTE,
    decoder_layers,
    supports_checkpointing,
)
from fastdpo.modeling.attention import attention_kind
from fastdpo.modeling.base_weights import host_weights
from fastdpo.modeling.fused import choose_kernels
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.host_blocks import LEAST_BUFFERS
from fastdpo.modeling.layout import ExecutionLayout, distinct_items, group_length
from fastdpo.modeling.packing import PackingMode
from fastdpo.planner import Plan, UnplannableError, plan_for_run

logger = logging.getLogger(__name__)


def plan_memory(
    policy: PreTrainedModel | PeftModel,
    args: DPOConfig,
    groups: PairGroups | None,
    mode: PackingMode,
    pairs_per_update: int,
) -> Plan | None:
    """Predict the peak memory and choose how to fill the GPU.

    Returns:
        None without a GPU or pairs, and for models that cannot be counted: those train without a
        plan, and the log says so.
    """
    device = unwrap_model(policy).device
    if device.type != "cuda" or not groups:
        return None
    lists = _Lists.of(groups, mode)
    try:
        plan = plan_for_run(
            policy,
            args,
            group_lengths(groups, mode),
            pairs_per_update=pairs_per_update,
            computed_tokens=sum(lists.lengths),
            scored_tokens=lists.scored,
            max_seqlen=longest_sequence(groups) - 1,
            repeated_tokens=lists.repeated if mode.shared_prefix else 0,
        )
    except UnplannableError as error:
        logger.warning("Training goes on without a memory plan: %s", error)
        return None
    if plan is not None:
        logger.info("%s", plan.describe())
    if plan is not None and not plan.fits:
        logger.warning(
            "By the plan this run does not fit. It is tried all the same: where memory runs out, "
            "micro-batches shrink."
        )
    return plan


def group_lengths(groups: PairGroups, mode: PackingMode) -> list[int]:
    """Tokens that each group takes in a micro-batch, as `group_length` counts them."""
    pairs = groups.pairs
    chosen, rejected = (pairs.lengths.prompt + each - 1 for each in pairs.lengths[1:])
    if not mode.packing:
        return (2 * np.maximum(chosen, rejected)).tolist()
    repeated = pairs.lengths.prompt + pairs.shared_tokens if mode.shared_prefix else 0
    return (chosen + rejected - repeated).tolist()


def choose_layout(
    policy: PreTrainedModel | PeftModel,
    args: DPOConfig,
    groups: PairGroups | None,
    mode: PackingMode,
    plan: Plan | None,
) -> ExecutionLayout:
    """The layout of the options; where they leave it open, of the plan, else the device's usual."""
    causal_lm = unwrap_model(policy)
    planned = plan.micro_batch_tokens if plan else default_micro_batch_tokens(causal_lm.device)
    tile, norm_tile = args.mlp_tile_tokens, None
    if plan is not None and supports_checkpointing(policy):
        norm_tile = None if tile == 0 else plan.norm_tile_tokens
        tile = plan.mlp_tile_tokens if tile is None else tile
    on_host = args.embeddings == "host"
    if args.embeddings == "auto" and plan is not None:
        on_host = plan.embeddings_on_host
    buffers = plan.base_buffers if plan is not None else 0
    if plan is None and (args.base_weights == "host" or host_weights(policy) is not None):
        buffers = LEAST_BUFFERS
    once = args.dequantize == "once"
    if args.dequantize == "auto" and plan is not None:
        once = plan.dequantize_once
    # A plan whose micro-batches are shorter than the longest pair counts on split completions.
    splits = plan is not None and groups and planned < max(group_lengths(groups, mode))
    return ExecutionLayout(
        micro_batch_tokens=args.micro_batch_tokens or planned,
        activation_plan=_activation_plan(policy, args, plan),
        mlp_tile_tokens=tile or None,
        norm_tile_tokens=norm_tile,
        embeddings_on_host=on_host,
        most_group_tokens=planned if splits else None,
        attention=attention_kind(causal_lm.config, causal_lm.device, mode.attention),
        kernels=choose_kernels(policy, args.kernels),
        dequantize_once=once,
        base_buffers=buffers,
    )


def worst_case_batch(
    groups: PairGroups, mode: PackingMode, layout: ExecutionLayout
) -> list[PromptGroup]:
    """The longest lists, as many as fill a micro-batch: the update that takes the most memory."""
    lists = _Lists.of(groups, mode)
    chosen: list[PromptGroup] = []
    num_tokens = 0
    numbered = zip(lists.lengths, range(len(lists.lengths)), strict=True)
    for length, index in sorted(numbered, reverse=True):
        if chosen and num_tokens + length > layout.micro_batch_tokens:
            break
        chosen += [groups[member] for member in lists.members[index]]
        num_tokens += length
    return chosen


@dataclass(frozen=True)
class _Lists:
    """The lists of a data set, each of whose distinct completions is computed once.

    Attributes:
        members: the indices of each list's pairs.
        lengths: tokens that each list takes in a micro-batch.
        repeated: prompt tokens that all lists together would repeat without a shared prefix.
        scored: scored tokens of all distinct completions.
    """

    members: list[list[int]]
    lengths: list[int]
    repeated: int
    scored: int

    @classmethod
    def of(cls, groups: PairGroups, mode: PackingMode) -> "_Lists":
        members: dict[int, list[int]] = {}
        for index, name in enumerate(groups.lists.tolist()):
            members.setdefault(name, []).append(index)
        pairs, keys = groups.pairs, groups.row_keys
        lengths = np.array(group_lengths(groups, mode))
        repeated, scored = pairs.lengths.prompt + pairs.shared_tokens, pairs.scored_tokens.sum(1)
        # A list of one pair is that pair, unless its completions are one.
        alone = keys[:, 0] != keys[:, 1]
        for first, its in members.items():
            if len(its) > 1 or not alone[first]:
                items, _ = distinct_items([groups[index] for index in its])
                joined = reduce(PromptGroup.joined, (item.group for item in items))
                lengths[first] = group_length(joined, mode)
                repeated[first] = (len(joined.completions) - 1) * shared_prefix_length(joined)
                scored[first] = sum(joined.scored_tokens)
        firsts = list(members)
        return cls(
            list(members.values()),
            lengths[firsts].tolist(),
            int(repeated[firsts].sum()),
            int(scored[firsts].sum()),
        )


def _activation_plan(
    policy: PreTrainedModel | PeftModel, args: DPOConfig, plan: Plan | None
) -> tuple[str, ...]:
    """Return what each decoder layer leaves for its backward, one of `ACTIVATIONS` each."""
    choice = args.activations
    if choice == "auto" and args.activation_checkpointing is False:
        choice = KEEP
    if choice in ("auto", KEEP) and not supports_checkpointing(policy):
        return ()  # layers that cannot be recomputed are kept anyway
    if choice == KEEP:
        return (KEEP,) * len(decoder_layers(policy))
    if choice == "auto" and plan is not None:
        return plan.activation_plan
    return (RECOMPUTE if choice == "auto" else choice,) * len(decoder_layers(policy))

"""The choice of a run's layout before training, by its options, a memory plan or the device."""

import logging
from collections.abc import Sequence
from functools import reduce

from peft import PeftModel
from transformers import PreTrainedModel

from fastdpo.batching import (
    PairGroups,
    PromptGroup,
    default_micro_batch_tokens,
    lists_of,
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
    groups: Sequence[PromptGroup] | None,
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
    computed = [group for _, group in _joined_lists(groups)]
    repeated = sum((len(g.completions) - 1) * shared_prefix_length(g) for g in computed)
    try:
        plan = plan_for_run(
            policy,
            args,
            group_lengths(groups, mode),
            pairs_per_update=pairs_per_update,
            computed_tokens=sum(group_lengths(computed, mode)),
            scored_tokens=sum(sum(group.scored_tokens) for group in computed),
            max_seqlen=longest_sequence(groups) - 1,
            repeated_tokens=repeated if mode.shared_prefix else 0,
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


def group_lengths(groups: Sequence[PromptGroup], mode: PackingMode) -> list[int]:
    """Tokens that each group takes in a micro-batch."""
    return [group_length(group, mode) for group in groups]


def choose_layout(
    policy: PreTrainedModel | PeftModel,
    args: DPOConfig,
    groups: Sequence[PromptGroup] | None,
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
    groups: Sequence[PromptGroup], mode: PackingMode, layout: ExecutionLayout
) -> list[PromptGroup]:
    """The longest lists, as many as fill a micro-batch: the update that takes the most memory."""
    lists = _joined_lists(groups)
    lengths = group_lengths([joined for _, joined in lists], mode)
    chosen: list[PromptGroup] = []
    num_tokens = 0
    for length, index in sorted(zip(lengths, range(len(lists)), strict=True), reverse=True):
        if chosen and num_tokens + length > layout.micro_batch_tokens:
            break
        chosen += [groups[member] for member in lists[index][0]]
        num_tokens += length
    return chosen


def _joined_lists(groups: Sequence[PromptGroup]) -> list[tuple[list[int], PromptGroup]]:
    """For each list of pairs their indices, and the group of its distinct completions."""
    names = groups.lists if isinstance(groups, PairGroups) else lists_of(groups)
    members: dict[int, list[int]] = {}
    for index, name in enumerate(names.tolist()):
        members.setdefault(name, []).append(index)
    return [
        (indices, reduce(PromptGroup.joined, (item.group for item in items)))
        for indices in members.values()
        for items, _ in [distinct_items([groups[index] for index in indices])]
    ]


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

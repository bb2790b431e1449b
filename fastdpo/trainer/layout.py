"""How a run is laid out on its device: chosen once before training, applied, kept to resume by."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastdpo.batching import (
    PromptGroup,
    default_micro_batch_tokens,
    group_tokens,
    shared_prefix_length,
)
from fastdpo.config import DPOConfig
from fastdpo.modeling.activations import (
    KEEP,
    RECOMPUTE,
    apply_activation_plan,
    decoder_layers,
    supports_checkpointing,
)
from fastdpo.modeling.attention import attention_kind
from fastdpo.modeling.embeddings import embeddings_to_host
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.tiles import tile_mlps, tile_norms
from fastdpo.planner import Plan, plan_for_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExecutionLayout:
    """What decides the bits of an update besides its pairs and weights.

    Attributes:
        micro_batch_tokens: T, the most tokens of a micro-batch.
        most_group_tokens: longer groups run one completion at a time; None splits none.
        activation_plan: of each decoder layer: keep, recompute or offload.
        mlp_tile_tokens: tokens of a tile of the MLPs; None runs them over the whole row.
        norm_tile_tokens: likewise of the norms.
        embeddings_on_host: whether embedding rows come from host memory.
        attention: what attends.
    """

    micro_batch_tokens: int
    activation_plan: tuple[str, ...]
    mlp_tile_tokens: int | None = None
    norm_tile_tokens: int | None = None
    embeddings_on_host: bool = False
    most_group_tokens: int | None = None
    attention: str = ""

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {**asdict(self), "activation_plan": list(self.activation_plan)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `as_json` wrote."""
        renamed = {"activation_plan": values.get("layer_policy"), **values}  # as 0.1 wrote it
        known: dict[str, Any] = {name: renamed[name] for name in cls.__dataclass_fields__}
        known["activation_plan"] = tuple(known["activation_plan"])
        return cls(**known)

    def apply(self, policy: PreTrainedModel | PeftModel) -> None:
        """Make the model run so; of a model that runs otherwise nothing stays."""
        if self.activation_plan:
            apply_activation_plan(policy, self.activation_plan)
        if self.activation_plan or self._tiles:
            self._tile(policy)
        if self.embeddings_on_host:
            embeddings_to_host(policy)

    def apply_to_reference(self, model: nn.Module) -> None:
        """The part that a pass without gradients has too, for a reference that is a model apart."""
        if self._tiles and supports_checkpointing(model):
            self._tile(model)

    @property
    def _tiles(self) -> bool:
        return bool(self.mlp_tile_tokens or self.norm_tile_tokens)

    def _tile(self, model: nn.Module) -> None:
        tile_mlps(model, self.mlp_tile_tokens)
        tile_norms(model, self.norm_tile_tokens)


def plan_memory(
    policy: PreTrainedModel | PeftModel,
    args: DPOConfig,
    groups: Sequence[PromptGroup] | None,
    mode: PackingMode,
    pairs_per_update: int,
) -> Plan | None:
    """Predict the peak and choose how to fill the GPU; None where there is no GPU or no pair."""
    device = unwrap_model(policy).device
    if device.type != "cuda" or not groups:
        return None
    completions = [(group, ids) for group in groups for ids in group.completions]
    found = plan_for_run(
        policy,
        args,
        group_lengths(groups, mode),
        pairs_per_update=pairs_per_update,
        scored_tokens=sum(len(ids) for _, ids in completions),
        max_seqlen=max(len(group.prompt_ids) + len(ids) - 1 for group, ids in completions),
        repeated_tokens=sum(map(shared_prefix_length, groups)) if mode.shared_prefix else 0,
    )
    if found is not None:
        logger.info("%s", found.describe())
    if found is not None and not found.fits:
        logger.warning(
            "By the plan this run does not fit. It is tried all the same: where memory runs out, "
            "micro-batches shrink."
        )
    return found


def group_lengths(groups: Sequence[PromptGroup], mode: PackingMode) -> list[int]:
    """Tokens that each group takes in a micro-batch."""
    rows = {"shared_prefix": mode.shared_prefix, "packing": mode.packing}
    return [group_tokens(group, **rows) for group in groups]


def choose_layout(
    policy: PreTrainedModel | PeftModel,
    args: DPOConfig,
    groups: Sequence[PromptGroup] | None,
    mode: PackingMode,
    plan: Plan | None,
) -> ExecutionLayout:
    """What the options ask for; where they ask for nothing, the plan or the device's usual."""
    causal_lm = unwrap_model(policy)
    planned = plan.micro_batch_tokens if plan else default_micro_batch_tokens(causal_lm.device)
    tile = args.mlp_tile_tokens
    if tile is None and plan is not None:
        tile = plan.mlp_tile_tokens
    on_host = args.embeddings == "host"
    if args.embeddings == "auto" and plan is not None:
        on_host = plan.embeddings_on_host
    # A plan whose rows are shorter than the longest pair has counted on its completions apart.
    apart = plan is not None and groups and planned < max(group_lengths(groups, mode))
    return ExecutionLayout(
        micro_batch_tokens=args.micro_batch_tokens or planned,
        activation_plan=_activation_plan(policy, args, plan),
        mlp_tile_tokens=tile or None,
        norm_tile_tokens=None if plan is None or tile == 0 else plan.norm_tile_tokens,
        embeddings_on_host=on_host,
        most_group_tokens=planned if apart else None,
        attention=attention_kind(causal_lm.config, causal_lm.device, mode.attention),
    )


def worst_case_batch(
    groups: Sequence[PromptGroup], mode: PackingMode, layout: ExecutionLayout
) -> list[PromptGroup]:
    """The longest groups, as many as fill a micro-batch: what takes the most memory."""
    chosen: list[PromptGroup] = []
    filled = 0
    for size, index in sorted(
        ((s, i) for i, s in enumerate(group_lengths(groups, mode))), reverse=True
    ):
        if chosen and filled + size > layout.micro_batch_tokens:
            break
        chosen.append(groups[index])
        filled += size
    return chosen


def _activation_plan(
    policy: PreTrainedModel | PeftModel, args: DPOConfig, plan: Plan | None
) -> tuple[str, ...]:
    choice = args.activations
    if choice == "auto" and args.activation_checkpointing is False:
        choice = KEEP
    if choice == KEEP:
        # Layers that cannot be recomputed are kept anyway.
        return (KEEP,) * len(decoder_layers(policy)) if supports_checkpointing(policy) else ()
    if choice == "auto" and plan is not None:
        return plan.activation_plan
    return (RECOMPUTE if choice == "auto" else choice,) * len(decoder_layers(policy))

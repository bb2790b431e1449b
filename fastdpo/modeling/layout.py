"""How a run's work is laid out on its device, and how it goes on where memory runs out.

One `ExecutionLayout` serves the updates, the reference pass and the evaluations of a run. Whoever
runs out of memory lowers it for all of them: first the tokens of a micro-batch are halved, down to
a single group; then the completions of the longest groups run one at a time. No result changes but
for rounding.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, TypeVar

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastdpo.batching import PromptGroup, default_micro_batch_tokens, group_tokens, linked
from fastdpo.modeling.activations import apply_activation_plan, supports_checkpointing
from fastdpo.modeling.base_weights import weights_to_host
from fastdpo.modeling.embeddings import embeddings_to_host
from fastdpo.modeling.fused import use_kernels
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.tiles import tile_mlps, tile_norms
from fastdpo.system import ranks
from fastdpo.system.oom import DoesNotFitError, free_cached_memory, oom_message

logger = logging.getLogger(__name__)

Unit = TypeVar("Unit")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Completions of one prompt that are computed together."""

    group: PromptGroup  # of these completions alone
    list: int  # items of one list are laid out together where they fit
    completions: tuple[int, ...]  # which of the distinct completions of the work they are

    def split(self) -> list["WorkItem"]:
        """One item for each completion."""
        return [
            WorkItem(self.group.only([place]), self.list, (completion,))
            for place, completion in enumerate(self.completions)
        ]


def distinct_items(
    groups: Sequence[PromptGroup],
) -> tuple[list[WorkItem], list[tuple[int, ...]]]:
    """The work of computing every completion of the groups once, whichever groups hold it.

    Returns:
        One item for each group, with those of its completions that no group before it holds, and
        no item where there are none; and for each group which of the distinct completions, counted
        in the order of the items, it consists of. Items are of one list where `lists_of` says so.
    """
    known: dict[bytes, int] = {}
    items: list[WorkItem] = []
    held: list[tuple[int, ...]] = []
    digests = [group.digests() for group in groups]
    for group, own, name in zip(groups, digests, linked(digests).tolist(), strict=True):
        before = len(known)
        its = tuple(known.setdefault(digest, len(known)) for digest in own)
        held.append(its)
        fresh = tuple(range(before, len(known)))
        if fresh == its:
            items.append(WorkItem(group, name, its))
        elif fresh:
            part = group.only([its.index(each) for each in fresh])
            items.append(WorkItem(part, name, fresh))
    return items, held


@dataclass
class ExecutionLayout:
    """Everything besides pairs and weights that decides the bits of an update.

    Attributes:
        micro_batch_tokens: T, the most tokens of a micro-batch; a longer group raises it.
        activation_plan: one of `ACTIVATIONS` for each decoder layer; empty leaves them as they
            are.
        mlp_tile_tokens: tokens of a tile of the MLPs; None runs them over the whole sequence.
        norm_tile_tokens: tokens of a tile of the norms; None runs them over the whole sequence.
        embeddings_on_host: whether the embeddings are looked up in host memory.
        base_buffers: on how many buffers the frozen base comes from host memory; 0 leaves it where
            it was loaded.
        most_group_tokens: longer groups run one completion at a time; None splits none.
        attention: kind of the attention computation, from `attention_kind`.
        kernels: fused or eager, from `choose_kernels`; empty leaves the layers as they are.
        dequantize_once: whether a recomputed layer's 4-bit weights are dequantized once for its
            recomputation and backward.
    """

    micro_batch_tokens: int
    activation_plan: tuple[str, ...] = ()
    mlp_tile_tokens: int | None = None
    norm_tile_tokens: int | None = None
    embeddings_on_host: bool = False
    most_group_tokens: int | None = None
    attention: str = ""
    kernels: str = ""
    dequantize_once: bool = False
    base_buffers: int = 0

    @classmethod
    def default(cls, model: nn.Module) -> Self:
        """The layout of a pass over a model for which nothing was chosen."""
        return cls(default_micro_batch_tokens(unwrap_model(model).device))

    def as_json(self) -> dict[str, Any]:
        """The layout as a checkpoint stores it."""
        return {**asdict(self), "activation_plan": list(self.activation_plan)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The layout that `as_json` wrote."""
        # Releases before kept the plan under another name and knew less to choose.
        renamed = {
            "activation_plan": values.get("layer_policy"), "kernels": "eager",
            "dequantize_once": False, "base_buffers": 0, **values,
        }  # fmt: skip
        known: dict[str, Any] = {entry.name: renamed[entry.name] for entry in fields(cls)}
        known["activation_plan"] = tuple(known["activation_plan"])
        return cls(**known)

    def assign(self, other: "ExecutionLayout") -> None:
        """Take over all values of another layout; whoever holds this one sees them."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(other, entry.name))

    def agree(self) -> None:
        """Lower the layout to the least of all ranks, after passes that each has done alone."""
        if ranks.count() == 1:
            return
        lowest = ranks.gathered([(self.micro_batch_tokens, self.most_group_tokens)])
        self.micro_batch_tokens = min(tokens for tokens, _ in lowest)
        limits = [limit for _, limit in lowest if limit is not None]
        self.most_group_tokens = min(limits, default=None)

    def apply(self, policy: PreTrainedModel | PeftModel) -> None:
        """Set the model up for this layout, whatever layout it had before."""
        self._choose_kernels(policy)
        if self.activation_plan:
            apply_activation_plan(
                policy, self.activation_plan, dequantize_once=self.dequantize_once
            )
        if self.activation_plan or self._tiles:
            self._tile(policy)
        if self.embeddings_on_host:
            embeddings_to_host(policy)
        if self.base_buffers:
            weights_to_host(policy, unwrap_model(policy).device).use_buffers(self.base_buffers)

    def apply_to_reference(self, model: nn.Module) -> None:
        """Set up a reference that is a model of its own: passes without gradients tile too."""
        self._choose_kernels(model)
        if self._tiles and supports_checkpointing(model):
            self._tile(model)

    def _choose_kernels(self, model: nn.Module) -> None:
        if self.kernels:
            use_kernels(model, self.kernels)

    @property
    def _tiles(self) -> bool:
        return bool(self.mlp_tile_tokens or self.norm_tile_tokens)

    def _tile(self, model: nn.Module) -> None:
        tile_mlps(model, self.mlp_tile_tokens)
        tile_norms(model, self.norm_tile_tokens)

    def split(self, items: Iterable[WorkItem], mode: PackingMode) -> list[WorkItem]:
        """The items, with those beyond `most_group_tokens` split into their completions."""
        limit = self.most_group_tokens
        if limit is None:
            return list(items)
        return [
            part
            for item in items
            for part in ([item] if group_length(item.group, mode) <= limit else item.split())
        ]

    def shrink(self, failed: Sequence[WorkItem], mode: PackingMode, message: str) -> None:
        """Lower the layout after memory ran out.

        Args:
            failed: the items of the work that ran out of memory.
            mode: how they ran through the model.
            message: the allocator's error.

        Raises:
            DoesNotFitError: the longest item is a single completion alone in its micro-batch.
        """
        longest = max(failed, key=lambda item: group_length(item.group, mode))
        most = group_length(longest.group, mode)
        used = min(
            max(self.micro_batch_tokens, most),
            sum(group_length(item.group, mode) for item in failed),
        )
        if used > most:
            self.micro_batch_tokens = max(most, used // 2)
            now = f"micro-batches of at most {self.micro_batch_tokens:,} tokens"
        elif len(longest.completions) > 1:
            self.micro_batch_tokens = min(self.micro_batch_tokens, most - 1)
            self.most_group_tokens = most - 1
            now = f"prompts of {most:,} tokens and more one completion at a time"
        else:
            raise DoesNotFitError.of_completion(most, message)
        logger.warning("Out of memory: %s from now on. Every result stays the same.", now)


def group_length(group: PromptGroup, mode: PackingMode) -> int:
    """Tokens that a group takes in a micro-batch of this mode."""
    return group_tokens(group, shared_prefix=mode.shared_prefix, packing=mode.packing)


def run_within_memory(
    items: Iterable[WorkItem],
    layout: ExecutionLayout,
    mode: PackingMode,
    *,
    lay_out: Callable[[Sequence[WorkItem]], Iterable[tuple[Sequence[WorkItem], Unit]]],
    work: Callable[[Unit], Result],
    undo: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Do work unit by unit; where memory runs out, shrink the layout and lay the rest out again.

    Args:
        items: what is to be done, in order.
        layout: lowered in place when memory runs out.
        mode: how the items run through the model.
        lay_out: turns items into units of work, lazily and in order: each with the items that it
            covers. Called again for the items that are left after memory ran out.
        work: computes one unit; may run out of memory anywhere.
        undo: removes what a failed `work` left behind.

    Yields:
        The result of every unit.

    Raises:
        DoesNotFitError: memory runs out with a single completion in a micro-batch.
    """
    remaining = layout.split(items, mode)
    while remaining:
        for covered, unit in lay_out(remaining):
            try:
                result = work(unit)
            except RuntimeError as error:
                message = oom_message(error)
                if message is None:
                    raise
            else:
                remaining = remaining[len(covered) :]
                yield result
                continue
            # Only here, with the exception gone, can its traceback's tensors be freed.
            undo()
            free_cached_memory()
            layout.shrink(covered, mode, message)
            remaining = layout.split(remaining, mode)
            break

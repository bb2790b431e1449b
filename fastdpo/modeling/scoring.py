"""Log-probs of many groups without gradients: the reference pass and every evaluation."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.batching import MicroBatch, PromptGroup, deal, longest_sequence, pack_in_order
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.layout import ExecutionLayout, WorkItem, group_length, run_within_memory
from fastdpo.modeling.loading import eval_mode
from fastdpo.modeling.logprobs import PackedLogprobs, packed_logprobs
from fastdpo.modeling.packing import PackingMode, choose_packing
from fastdpo.modeling.positions import require_positions
from fastdpo.system import ranks, signals
from fastdpo.system.console import progress_bar


@dataclass(frozen=True, slots=True, eq=False)
class ScoredGroup:
    """Log-probs of one group's k completions."""

    index: int  # which of the groups given
    logps: np.ndarray  # (k,) float64, nats
    token_logps: tuple[np.ndarray, ...]  # k arrays of (C,) float32, nats
    extras: dict[str, tuple[np.ndarray, ...]]  # for each output asked for, k arrays of (C,)


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Log-probs of n groups of k completions, in the order in which they were given."""

    logps: np.ndarray  # (n, k) float64, nats
    tokens: np.ndarray  # (n, k) int64: scored tokens
    token_logps: Tensor  # (M,) float32, nats: group by group, completion by completion
    extras: dict[str, Tensor]  # for each output asked for (M,) in the same order


def score_pairs(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    layout: ExecutionLayout | None = None,
    *,
    outputs: tuple[str, ...] = (),
    **options: Any,
) -> ScoredPairs:
    """Score all groups, each with the same number of completions, and collect the log-probs.

    Takes the arguments of `score_groups`. Several ranks share the groups, and all get the result.

    Raises:
        SystemExit, KeyboardInterrupt: after a signal to one of several ranks, if one may end this.
    """
    layout = ExecutionLayout.default(model) if layout is None else layout
    mine = share_of(groups, options.get("mode") or choose_packing(model))
    found = []
    with closing(
        score_groups(model, [groups[i] for i in mine], layout, outputs=outputs, **options)
    ) as scores:
        for each in scores:
            found.append(replace(each, index=mine[each.index]))
            if ranks.count() > 1 and signals.hurries():
                break
    signals.meet()
    layout.agree()
    scored = sorted(ranks.gathered(found), key=lambda s: s.index)
    metrics = {
        name: torch.from_numpy(np.concatenate([part for s in scored for part in s.extras[name]]))
        for name in outputs
    }
    tokens = np.array([[len(part) for part in s.token_logps] for s in scored], dtype=np.int64)
    token_logps = np.concatenate([part for s in scored for part in s.token_logps])
    logps = np.stack([s.logps for s in scored])
    return ScoredPairs(logps, tokens, torch.from_numpy(token_logps), metrics)


def share_of(groups: Sequence[PromptGroup], mode: PackingMode) -> list[int]:
    """The indices of the groups that this rank scores: all of them in a single process."""
    lengths = [group_length(group, mode) for group in groups]
    return deal(lengths, ranks.count())[ranks.index()]


def score_groups(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    layout: ExecutionLayout | None = None,
    *,
    outputs: tuple[str, ...] = (),
    mode: PackingMode | None = None,
    description: str | None = None,
) -> Generator[ScoredGroup]:
    """Score every group once, the longest first, in full micro-batches.

    Runs in eval mode and leaves RNG state, training flags and the model's own attention setting as
    they were, also when the caller stops early.

    Args:
        model: a causal LM or a PeftModel on it, with its adapters on or off as they are.
        groups: the groups to score; their `ref_logps` are not read.
        layout: bounds the micro-batches, and is lowered where memory runs out; None takes the
            device's usual size.
        outputs: extra per-token metrics, as `linear_logprobs` names them.
        mode: how pairs run through the model; None chooses.
        description: label of a progress bar; None shows none.

    Yields:
        Every group once, in the order in which they are scored.

    Raises:
        DoesNotFitError: memory runs out with a single completion in a micro-batch.
        ValueError: the model has no positions for the longest sequence.
    """
    require_positions(model, longest_sequence(groups))
    layout = ExecutionLayout.default(model) if layout is None else layout
    mode = choose_packing(model) if mode is None else mode
    lengths = [group_length(group, mode) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (-lengths[i], i))
    with (
        progress_bar(len(groups), description, "pair") as bar,
        eval_mode(model),
        torch.no_grad(),
        packed_attention(unwrap_model(model).config, mode.attention),
    ):
        micro_batches = run_within_memory(
            (WorkItem.whole(i, groups[i]) for i in order),
            layout,
            mode,
            lay_out=lambda items: _micro_batches(items, layout, mode),
            work=lambda unit: _score(model, *unit, outputs),
        )
        for group in _join_completions(chain.from_iterable(micro_batches), groups):
            yield group
            bar.update(1)


def _micro_batches(
    items: Sequence[WorkItem], layout: ExecutionLayout, mode: PackingMode
) -> Iterator[tuple[Sequence[WorkItem], tuple[Sequence[WorkItem], MicroBatch]]]:
    """Pack the items in their order: the items of each micro-batch, and both together."""
    first = 0
    for micro_batch in pack_in_order(
        (item.group for item in items),
        layout.micro_batch_tokens,
        shared_prefix=mode.shared_prefix,
        packing=mode.packing,
    ):
        covered = items[first : first + len(micro_batch.group_indices)]
        first += len(covered)
        yield covered, (covered, micro_batch)


def _score(
    model: nn.Module, items: Sequence[WorkItem], micro_batch: MicroBatch, outputs: tuple[str, ...]
) -> list[ScoredGroup]:
    """The log-probs of one micro-batch, item by item."""
    on_device = micro_batch.to(unwrap_model(model).device)
    return _split(packed_logprobs(model, on_device, outputs), on_device, items)


def _split(
    logprobs: PackedLogprobs, micro_batch: MicroBatch, items: Sequence[WorkItem]
) -> list[ScoredGroup]:
    """The log-probs of a micro-batch's completions, sorted into its items."""
    logps = logprobs.logps.cpu().numpy()
    ends = np.cumsum(micro_batch.completion_tokens.cpu().numpy())[:-1]
    token_logps = np.split(logprobs.token_logps.float().cpu().numpy(), ends)
    extras = {
        name: np.split(metric.cpu().numpy(), ends) for name, metric in logprobs.extras.items()
    }
    scored = []
    first = 0
    for item in items:
        part = slice(first, first + len(item.completions))
        metrics = {name: tuple(metric[part]) for name, metric in extras.items()}
        scored.append(ScoredGroup(item.index, logps[part], tuple(token_logps[part]), metrics))
        first = part.stop
    return scored


def _join_completions(
    scored: Iterable[ScoredGroup], groups: Sequence[PromptGroup]
) -> Iterator[ScoredGroup]:
    """The scored groups, those that came one completion at a time put together again."""
    parts: list[ScoredGroup] = []
    for part in scored:
        parts.append(part)
        if sum(len(each.logps) for each in parts) < len(groups[part.index].completions):
            continue
        extras = {
            name: tuple(x for each in parts for x in each.extras[name]) for name in part.extras
        }
        token_logps = tuple(x for each in parts for x in each.token_logps)
        logps = np.concatenate([each.logps for each in parts])
        yield ScoredGroup(part.index, logps, token_logps, extras)
        parts = []

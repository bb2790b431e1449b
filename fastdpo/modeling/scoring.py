"""Log-probs of many groups without gradients: the reference pass and every evaluation."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.batching import (
    MicroBatch,
    PairGroups,
    PromptGroup,
    deal,
    lists_of,
    longest_sequence,
    pack_in_order,
)
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.layout import (
    ExecutionLayout,
    WorkItem,
    distinct_items,
    group_length,
    run_within_memory,
)
from fastdpo.modeling.loading import eval_mode
from fastdpo.modeling.logprobs import packed_logprobs
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
    mode: PackingMode | None = None,
    description: str | None = None,
) -> ScoredPairs:
    """Score all groups, each with the same number of completions, and collect the log-probs.

    Takes the arguments of `score_groups`. Several ranks share the groups, and all get the result.

    Raises:
        SystemExit, KeyboardInterrupt: after a signal to one of several ranks, if one may end this.
    """
    layout = ExecutionLayout.default(model) if layout is None else layout
    mode = choose_packing(model) if mode is None else mode
    mine = share_of(groups, mode)
    scoring = score_groups(
        model,
        [groups[i] for i in mine],
        layout,
        outputs=outputs,
        mode=mode,
        description=description,
    )
    found = []
    with closing(scoring) as scores:
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
    """The indices of the groups that this rank scores: all of them in a single process.

    Groups that share completions stay together, so none is computed by two ranks.
    """
    if ranks.count() == 1:
        return list(range(len(groups)))
    lists = groups.lists if isinstance(groups, PairGroups) else lists_of(groups)
    lengths = [group_length(group, mode) for group in groups]
    return deal(lengths, ranks.count(), lists.tolist())[ranks.index()]


def score_groups(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    layout: ExecutionLayout | None = None,
    *,
    outputs: tuple[str, ...] = (),
    mode: PackingMode | None = None,
    description: str | None = None,
) -> Generator[ScoredGroup]:
    """Score every group, the longest first, in full micro-batches.

    A completion that several groups hold is computed once. Runs in eval mode and leaves RNG state,
    training flags and the model's own attention setting as they were, also when the caller stops
    early.

    Args:
        model: a causal LM or a PeftModel on it, with its adapters on or off as they are.
        groups: the groups to score; their `ref_logps` are not read.
        layout: bounds the micro-batches, and is lowered where memory runs out; None takes the
            device's usual size.
        outputs: extra per-token metrics, as `linear_logprobs` names them.
        mode: how pairs run through the model; None chooses.
        description: label of a progress bar; None shows none.

    Yields:
        Every group once, as soon as all of its completions are scored.

    Raises:
        DoesNotFitError: memory runs out with a single completion in a micro-batch.
        ValueError: the model has no positions for the longest sequence.
    """
    require_positions(model, longest_sequence(groups))
    layout = ExecutionLayout.default(model) if layout is None else layout
    mode = choose_packing(model) if mode is None else mode
    items, held = distinct_items(groups)
    with (
        progress_bar(len(groups), description, "pair") as bar,
        eval_mode(model),
        torch.no_grad(),
        packed_attention(unwrap_model(model).config, mode.attention),
    ):
        micro_batches = run_within_memory(
            _longest_first(items, mode),
            layout,
            mode,
            lay_out=lambda items: _micro_batches(items, layout, mode),
            work=lambda unit: _score(model, *unit, outputs),
        )
        for group in _whole_groups(chain.from_iterable(micro_batches), held):
            yield group
            bar.update(1)


def _longest_first(items: Sequence[WorkItem], mode: PackingMode) -> list[WorkItem]:
    """The items by falling length; those of a list follow each other, in their own order."""
    longest: dict[int, int] = {}
    for item in items:
        length = group_length(item.group, mode)
        longest[item.list] = max(length, longest.get(item.list, 0))
    return sorted(items, key=lambda item: (-longest[item.list], item.list))


def _micro_batches(
    items: Sequence[WorkItem], layout: ExecutionLayout, mode: PackingMode
) -> Iterator[tuple[Sequence[WorkItem], tuple[Sequence[WorkItem], MicroBatch]]]:
    """Pack the items in their order: the items of each micro-batch, and both together."""
    first = 0
    for micro_batch in pack_in_order(
        [item.group for item in items],
        layout.micro_batch_tokens,
        shared_prefix=mode.shared_prefix,
        packing=mode.packing,
        lists=[item.list for item in items],
    ):
        covered = items[first : first + len(micro_batch.group_indices)]
        first += len(covered)
        yield covered, (covered, micro_batch)


@dataclass(frozen=True, slots=True, eq=False)
class _ScoredCompletion:
    completion: int  # which of the distinct ones
    logps: float  # nats, from float64
    token_logps: np.ndarray  # (C,) float32, nats
    extras: dict[str, np.ndarray]  # (C,) each


def _score(
    model: nn.Module, items: Sequence[WorkItem], micro_batch: MicroBatch, outputs: tuple[str, ...]
) -> list[_ScoredCompletion]:
    """The log-probs of the completions of one micro-batch."""
    on_device = micro_batch.to(unwrap_model(model).device)
    logprobs = packed_logprobs(model, on_device, outputs)
    ends = np.cumsum(micro_batch.completion_tokens.numpy())[:-1]
    token_logps = np.split(logprobs.token_logps.float().cpu().numpy(), ends)
    extras = {
        name: np.split(metric.cpu().numpy(), ends) for name, metric in logprobs.extras.items()
    }
    completions = (completion for item in items for completion in item.completions)
    return [
        _ScoredCompletion(
            completion, logps, tokens, {name: parts[place] for name, parts in extras.items()}
        )
        for place, (completion, logps, tokens) in enumerate(
            zip(completions, logprobs.logps.tolist(), token_logps, strict=True)
        )
    ]


def _whole_groups(
    scored: Iterable[_ScoredCompletion], held: Sequence[tuple[int, ...]]
) -> Iterator[ScoredGroup]:
    """The groups, each when the last of its completions has come.

    Args:
        scored: the distinct completions, in any order.
        held: which of them each group consists of.
    """
    holders: dict[int, list[int]] = {}
    for index, completions in enumerate(held):
        for completion in set(completions):
            holders.setdefault(completion, []).append(index)
    unscored = [len(set(completions)) for completions in held]
    needed_by = {completion: len(indices) for completion, indices in holders.items()}
    known: dict[int, _ScoredCompletion] = {}
    for each in scored:
        known[each.completion] = each
        for index in holders[each.completion]:
            unscored[index] -= 1
            if unscored[index]:
                continue
            parts = [known[completion] for completion in held[index]]
            yield ScoredGroup(
                index,
                np.array([part.logps for part in parts]),
                tuple(part.token_logps for part in parts),
                {name: tuple(part.extras[name] for part in parts) for name in each.extras},
            )
            for completion in set(held[index]):
                needed_by[completion] -= 1
                if not needed_by[completion]:
                    del known[completion]

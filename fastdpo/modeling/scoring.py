"""Log-probs of many groups without gradients: the reference pass and every evaluation."""

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.batching import MicroBatch, PromptGroup, group_tokens, pack_in_order
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.loading import eval_mode
from fastdpo.modeling.logprobs import PackedLogprobs, packed_logprobs
from fastdpo.modeling.packing import PackingMode, choose_packing
from fastdpo.system.console import progress_bar
from fastdpo.system.oom import DoesNotFitError, free_cached_memory, oom_message

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ScoredGroup:
    """Log-probs of one group's k completions."""

    index: int  # which of the scored groups
    logps: np.ndarray  # (k,) float64, nats
    token_logps: tuple[np.ndarray, ...]  # k arrays of (C,) float32, nats
    extras: dict[str, tuple[np.ndarray, ...]]  # per asked output, k arrays of (C,)


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Log-probs of n groups of k completions, in the order in which they were given."""

    logps: np.ndarray  # (n, k) float64, nats
    tokens: np.ndarray  # (n, k) int64: scored tokens
    token_logps: Tensor  # (M,) float32, nats: group by group, completion by completion
    extras: dict[str, Tensor]  # per asked output (M,), likewise


def score_pairs(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    *,
    outputs: tuple[str, ...] = (),
    **options: Any,
) -> ScoredPairs:
    """`score_groups`, collected. Takes its options."""
    scored = sorted(score_groups(model, groups, outputs=outputs, **options), key=lambda s: s.index)
    metrics = {
        name: torch.from_numpy(np.concatenate([part for s in scored for part in s.extras[name]]))
        for name in outputs
    }
    tokens = np.array([[len(part) for part in s.token_logps] for s in scored], dtype=np.int64)
    token_logps = np.concatenate([part for s in scored for part in s.token_logps])
    logps = np.stack([s.logps for s in scored])
    return ScoredPairs(logps, tokens, torch.from_numpy(token_logps), metrics)


def score_groups(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    *,
    micro_batch_tokens: int,
    outputs: tuple[str, ...] = (),
    mode: PackingMode | None = None,
    description: str | None = None,
) -> Generator[ScoredGroup]:
    """Score every group once, the longest first, in full micro-batches.

    Runs in eval mode and touches neither RNG state, training flags nor the model's own attention
    setting, also when the caller stops early.

    Args:
        model: a causal LM or a PeftModel on it; adapters as the caller has set them.
        groups: what to score; their `ref_logps` are not looked at.
        micro_batch_tokens: T, the most tokens of a micro-batch; a longer group raises it.
        outputs: extra per-token metrics, as `linear_logprobs` names them.
        mode: how pairs run through the model; None chooses.
        description: shown beside a progress bar; None shows none.

    Yields:
        Every group once, in the order in which they are scored.

    Raises:
        DoesNotFitError: memory runs out with a single completion in a micro-batch. Before that,
            micro-batches shrink.
    """
    mode = choose_packing(model) if mode is None else mode
    sizes = [_tokens_of(group, mode) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (-sizes[i], i))
    pieces = [_Piece(i, groups[i]) for i in order]
    with (
        progress_bar(len(groups), description, "pair") as bar,
        eval_mode(model),
        torch.no_grad(),
        packed_attention(unwrap_model(model).config, mode.attention),
    ):
        scored = _scored_pieces(model, pieces, micro_batch_tokens, mode, outputs)
        for whole in _joined(scored, groups):
            yield whole
            bar.update(1)


class _Piece(NamedTuple):
    """A group, or where that did not fit, one of its completions."""

    index: int  # which of the scored groups
    group: PromptGroup


def _tokens_of(group: PromptGroup, mode: PackingMode) -> int:
    return group_tokens(group, shared_prefix=mode.shared_prefix, packing=mode.packing)


def _scored_pieces(
    model: nn.Module, pieces: list[_Piece], limit: int, mode: PackingMode, outputs: tuple[str, ...]
) -> Iterator[ScoredGroup]:
    """All pieces in their order; where memory runs out, in smaller micro-batches from there on."""
    done = 0
    while done < len(pieces):
        pieces, done = pieces[done:], 0
        for micro_batch in pack_in_order(
            (piece.group for piece in pieces),
            limit,
            shared_prefix=mode.shared_prefix,
            packing=mode.packing,
        ):
            tried = pieces[done : done + len(micro_batch.group_indices)]
            found = _attempt(model, micro_batch, tried, outputs)
            if isinstance(found, str):
                free_cached_memory()
                limit, smaller = _made_smaller(tried, limit, mode, found)
                pieces = smaller + pieces[done + len(tried) :]
                done = 0
                break
            yield from found
            done += len(tried)


def _attempt(
    model: nn.Module, micro_batch: MicroBatch, tried: Sequence[_Piece], outputs: tuple[str, ...]
) -> list[ScoredGroup] | str:
    """The log-probs of a micro-batch, or what the allocator said when memory ran out."""
    try:
        on_device = micro_batch.to(unwrap_model(model).device)
        return _split(packed_logprobs(model, on_device, outputs), on_device, tried)
    except RuntimeError as error:
        message = oom_message(error)
        if message is None:
            raise
        return message


def _made_smaller(
    tried: list[_Piece], limit: int, mode: PackingMode, message: str
) -> tuple[int, list[_Piece]]:
    """Half the tokens of a micro-batch, down to one group; then that group's completions."""
    sizes = [_tokens_of(piece.group, mode) for piece in tried]
    if len(tried) > 1:
        limit = max(max(sizes), min(limit, sum(sizes)) // 2)
        now = f"micro-batches of at most {limit:,} tokens"
    else:
        ((index, group),) = tried
        if len(group.completions) == 1:
            raise DoesNotFitError.of_completion(sizes[0], message)
        tried = [_Piece(index, PromptGroup(group.prompt_ids, (ids,))) for ids in group.completions]
        limit = min(limit, sizes[0] - 1)
        now = f"the completions of a prompt, {sizes[0]:,} tokens, one at a time"
    logger.warning("Out of memory in a pass without gradients: %s from now on.", now)
    return limit, tried


def _split(
    logprobs: PackedLogprobs, micro_batch: MicroBatch, tried: Sequence[_Piece]
) -> list[ScoredGroup]:
    logps = logprobs.logps.cpu().numpy()
    ends = np.cumsum(micro_batch.completion_tokens.cpu().numpy())[:-1]
    tokens = np.split(logprobs.token_logps.float().cpu().numpy(), ends)
    extras = {
        name: np.split(metric.cpu().numpy(), ends) for name, metric in logprobs.extras.items()
    }
    found = []
    first = 0
    for index, group in tried:
        rows = slice(first, first + len(group.completions))
        own = {name: tuple(metric[rows]) for name, metric in extras.items()}
        found.append(ScoredGroup(index, logps[rows], tuple(tokens[rows]), own))
        first = rows.stop
    return found


def _joined(scored: Iterable[ScoredGroup], groups: Sequence[PromptGroup]) -> Iterator[ScoredGroup]:
    """Groups whose completions came one by one, as if they had come together."""
    parts: list[ScoredGroup] = []
    for part in scored:
        parts.append(part)
        if sum(len(each.logps) for each in parts) < len(groups[part.index].completions):
            continue
        extras = {
            name: tuple(x for each in parts for x in each.extras[name]) for name in part.extras
        }
        tokens = tuple(x for each in parts for x in each.token_logps)
        yield ScoredGroup(part.index, np.concatenate([p.logps for p in parts]), tokens, extras)
        parts = []

"""Log-probs of many groups without gradients: the reference pass and every evaluation."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.batching import Group, MicroBatch, group_tokens, pack_in_order
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.families import PassMode, pass_mode
from fastdpo.modeling.head import causal_lm_of
from fastdpo.modeling.loading import eval_mode
from fastdpo.modeling.logprobs import PackedLogprobs, packed_logprobs
from fastdpo.report import progress_bar


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
    model: nn.Module, groups: Sequence[Group], *, outputs: tuple[str, ...] = (), **options: Any
) -> ScoredPairs:
    """`score_groups`, collected. Takes its options."""
    scored = sorted(score_groups(model, groups, outputs=outputs, **options), key=lambda s: s.index)
    figures = {
        name: torch.from_numpy(np.concatenate([part for s in scored for part in s.extras[name]]))
        for name in outputs
    }
    tokens = np.array([[len(part) for part in s.token_logps] for s in scored], dtype=np.int64)
    token_logps = np.concatenate([part for s in scored for part in s.token_logps])
    logps = np.stack([s.logps for s in scored])
    return ScoredPairs(logps, tokens, torch.from_numpy(token_logps), figures)


def score_groups(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    micro_batch_tokens: int,
    outputs: tuple[str, ...] = (),
    mode: PassMode | None = None,
    description: str | None = None,
) -> Generator[ScoredGroup]:
    """Score every group once, the longest first, in full micro-batches.

    Runs in eval mode and touches neither RNG state, training flags nor the model's own attention
    setting, also when the caller stops early.

    Args:
        model: a causal LM or a PeftModel on it; adapters as the caller has set them.
        groups: what to score; their `ref_logps` are not looked at.
        micro_batch_tokens: T, the most tokens of a micro-batch; a longer group raises it.
        outputs: extra per-token figures, as `linear_logprobs` names them.
        mode: how pairs run through the model; None chooses.
        description: shown beside a progress bar; None shows none.

    Yields:
        Every group once, in the order in which they are scored.
    """
    causal_lm = causal_lm_of(model)
    mode = pass_mode(model) if mode is None else mode
    layout = {"shared_prefix": mode.shared_prefix, "packing": mode.packing}
    sizes = [group_tokens(group, **layout) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (-sizes[i], i))
    micro_batches = pack_in_order((groups[i] for i in order), micro_batch_tokens, **layout)
    with (
        progress_bar(len(groups), description, "pair") as bar,
        eval_mode(model),
        torch.no_grad(),
        packed_attention(causal_lm.config, mode.attention),
    ):
        for micro_batch in micro_batches:
            on_device = micro_batch.to(causal_lm.device)
            scored = _split(packed_logprobs(model, on_device, outputs), on_device, groups, order)
            yield from scored
            bar.update(len(micro_batch.group_indices))


def _split(
    logprobs: PackedLogprobs, micro_batch: MicroBatch, groups: Sequence[Group], order: list[int]
) -> Iterator[ScoredGroup]:
    logps = logprobs.logps.cpu().numpy()
    ends = np.cumsum(micro_batch.completion_tokens.cpu().numpy())[:-1]
    tokens = np.split(logprobs.token_logps.float().cpu().numpy(), ends)
    extras = {
        name: np.split(figure.cpu().numpy(), ends) for name, figure in logprobs.extras.items()
    }
    first = 0
    for position in micro_batch.group_indices:
        index = order[position]
        rows = slice(first, first + len(groups[index].completions))
        yield ScoredGroup(
            index,
            logps[rows],
            tuple(tokens[rows]),
            {name: tuple(figure[rows]) for name, figure in extras.items()},
        )
        first = rows.stop

"""One update: the gradient of B pairs, whatever micro-batches they fall into.

A loss sees a completion through a few numbers (its summed log-prob above all), which gives two ways
to one gradient. Directly: each micro-batch forward, the losses of its pairs, backward. By
coefficients: a first pass without gradients finds the numbers of all completions, the loss of the
whole update is differentiated by them, and a second pass runs each micro-batch backward with its
coefficients. The second way costs one more forward and needs neither the two completions of a pair
nor the pairs that a loss couples in one micro-batch.

Out of memory, the update starts again from no gradient and the same random state with smaller
micro-batches: fewer groups, then single completions. It stays the same update.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.batching import MicroBatch, PromptGroup, group_tokens, pack_update
from fastdpo.losses import (
    LossFunction,
    PairLogps,
    couples_pairs,
    ld_logps,
    needs_reference,
    pair_losses,
    token_outputs,
    wpo_alignment,
    wpo_weights,
)
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.loading import eval_mode
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.reference_model import ReferenceModel
from fastdpo.options import LossOptions
from fastdpo.system.oom import DoesNotFitError, free_cached_memory, oom_message
from fastdpo.system.rng import RNGState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Completions of one prompt that are computed together, and which of the update's they are."""

    group: PromptGroup
    rows: tuple[int, ...]  # 2 x pair + (0 chosen, 1 rejected)


@dataclass(frozen=True, eq=False)
class UpdateResult:
    """What one update computed, all without gradient."""

    loss: Tensor  # () float64, the mean over the pairs, with the weighted auxiliary loss
    logps: Tensor  # (B, 2) float64 of chosen and rejected, as the loss took them; nats
    ref_logps: Tensor  # (B, 2) float64
    tokens: Tensor  # (B, 2) int64: scored tokens
    token_metrics: dict[str, Tensor]  # (M,) by the names asked for
    token_rows: Tensor  # (M,) int64: which completion each token belongs to
    computed_tokens: int  # every shared token once
    aux_loss: Tensor | None  # () float64, of the routers of a mixture of experts


class Update:
    """Computes the gradients of updates, with the memory that there is.

    Args:
        policy: a causal LM or a PeftModel on one.
        reference: what gives the reference log-probs of groups that come without.
        options: of the loss.
        micro_batch_tokens: T, the most tokens of a micro-batch.
        mode: how pairs run through the model.
        merge_prompts: compute a prompt that several pairs of an update share once for all.
        backward: adds the gradient of a () tensor to the parameters.
        autocast: a context around every forward.
        loss_function: in place of the built losses; `PairLogps` says what it is given.
        aux_loss_coef: weight of the routers' load-balancing loss, each micro-batch counting by its
            tokens; 0 for models without routers.

    Attributes:
        micro_batch_tokens: lowered when memory runs out.
        most_group_tokens: groups beyond it are split into their completions; None splits none.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: ReferenceModel,
        options: LossOptions,
        *,
        micro_batch_tokens: int,
        mode: PackingMode,
        merge_prompts: bool = False,
        backward: Callable[[Tensor], None],
        autocast: Callable[[], AbstractContextManager[Any]],
        loss_function: LossFunction | None = None,
        aux_loss_coef: float = 0.0,
    ) -> None:
        self.policy, self.reference, self.options = policy, reference, options
        self.micro_batch_tokens, self.mode = micro_batch_tokens, mode
        self.merge_prompts = merge_prompts
        self.most_group_tokens: int | None = None
        self.backward, self.autocast = backward, autocast
        self.loss_function, self.aux_loss_coef = loss_function, aux_loss_coef

    def run(self, groups: Sequence[PromptGroup], outputs: tuple[str, ...] = ()) -> UpdateResult:
        """Add the gradient of the mean loss of B pairs to parameters that have none yet.

        Args:
            groups: B groups of a chosen and a rejected completion.
            outputs: extra per-token metrics, as `linear_logprobs` names them.

        Raises:
            DoesNotFitError: memory runs out with a single completion in a micro-batch.
        """
        state = RNGState.capture()
        while True:
            pieces = self._pieces(groups)
            found = self._attempt(groups, pieces, outputs)
            if isinstance(found, UpdateResult):
                return found
            # Only here, with the exception gone, is what its traceback held free.
            self._zero_grad()
            state.restore()
            self._shrink_micro_batches([piece.group for piece in pieces], found)

    def probe_memory(self, groups: Sequence[PromptGroup]) -> None:
        """`run` for its memory alone: no gradient stays and no random number is drawn."""
        state = RNGState.capture()
        self.run(groups)
        self._zero_grad()
        state.restore()

    def _attempt(
        self, groups: Sequence[PromptGroup], pieces: Sequence[WorkItem], outputs: tuple[str, ...]
    ) -> UpdateResult | str:
        """The update, or what the allocator said when memory ran out."""
        try:
            return _StepAttempt(self, groups, pieces, outputs).run()
        except RuntimeError as error:
            message = oom_message(error)
            if message is None:
                raise
            return message

    def _pieces(self, groups: Sequence[PromptGroup]) -> list[WorkItem]:
        pieces = []
        for index, group in enumerate(groups):
            rows = (2 * index, 2 * index + 1)
            limit = self.most_group_tokens
            if limit is None or self.tokens_of(group) <= limit:
                pieces.append(WorkItem(group, rows))
            else:
                pieces += [
                    WorkItem(PromptGroup(group.prompt_ids, (completion,)), (row,))
                    for completion, row in zip(group.completions, rows, strict=True)
                ]
        return pieces

    def tokens_of(self, group: PromptGroup) -> int:
        """Tokens that the group takes in a micro-batch."""
        mode = self.mode
        return group_tokens(group, shared_prefix=mode.shared_prefix, packing=mode.packing)

    def _zero_grad(self) -> None:
        for parameter in self.policy.parameters():
            parameter.grad = None
        free_cached_memory()

    def _shrink_micro_batches(self, tried: Sequence[PromptGroup], message: str) -> None:
        """Half the tokens of a micro-batch, down to one group; then single completions."""
        largest = max(tried, key=self.tokens_of)
        most, fullest = self.tokens_of(largest), sum(map(self.tokens_of, tried))
        used = min(max(self.micro_batch_tokens, most), fullest)
        if used > most:
            self.micro_batch_tokens = max(most, used // 2)
            now = f"micro-batches of at most {self.micro_batch_tokens:,} tokens"
        elif len(largest.completions) > 1:
            self.most_group_tokens = most - 1
            now = f"pairs of {most:,} tokens and more one completion at a time"
        else:
            raise DoesNotFitError.of_completion(most, message)
        logger.warning("Out of memory: %s from now on. The update stays the same.", now)


class _StepAttempt:
    """One try at one update."""

    def __init__(
        self,
        update: Update,
        groups: Sequence[PromptGroup],
        pieces: Sequence[WorkItem],
        outputs: tuple[str, ...],
    ) -> None:
        self.update, self.options, self.pieces = update, update.options, pieces
        self.groups, self.outputs = groups, outputs
        self.device = unwrap_model(update.policy).device
        micro_batches = pack_update(
            [piece.group for piece in pieces],
            update.micro_batch_tokens,
            shared_prefix=update.mode.shared_prefix,
            packing=update.mode.packing,
            merge_prompts=update.merge_prompts,
        )
        self.micro_batches = [micro_batch.to(self.device) for micro_batch in micro_batches]
        lengths = [[len(completion) for completion in group.completions] for group in groups]
        self.tokens = torch.tensor(lengths, device=self.device)  # (B, 2)
        self.logps = torch.zeros(2 * len(groups), dtype=torch.float64, device=self.device)
        self.token_metrics: dict[str, list[Tensor]] = {name: [] for name in outputs}
        self.token_rows: list[Tensor] = []
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.aux_loss = torch.zeros_like(self.loss)
        self.computed_tokens = sum(micro_batch.num_tokens for micro_batch in self.micro_batches)

    def run(self) -> UpdateResult:
        """Both passes, or the one that is enough."""
        self.ref_logps = self._ref_logps()
        whole_pairs = all(
            len(piece.rows) == len(self.groups[0].completions) for piece in self.pieces
        )
        config = unwrap_model(self.update.policy).config
        with packed_attention(config, self.update.mode.attention):
            if whole_pairs and not couples_pairs(self.options, self.update.loss_function):
                for micro_batch in self.micro_batches:
                    self._direct(micro_batch)
            else:
                self._grad_cache()
        return UpdateResult(
            self.loss + self.update.aux_loss_coef * self.aux_loss,
            self.logps.view(-1, 2),
            self.ref_logps,
            self.tokens,
            {name: torch.cat(parts) for name, parts in self.token_metrics.items()},
            torch.cat(self.token_rows) if self.outputs else self.tokens.new_empty(0),
            self.computed_tokens,
            self.aux_loss if self.update.aux_loss_coef else None,
        )

    def _direct(self, micro_batch: MicroBatch) -> None:
        rows = self._rows(micro_batch)
        metrics, aux_loss = self._metrics(micro_batch, rows, self.outputs)
        order = rows.argsort()
        loss = self._loss({name: values[order] for name, values in metrics.items()}, rows[order])
        self.update.backward(loss + aux_loss)
        self.loss += loss.detach()

    def _grad_cache(self) -> None:
        state = RNGState.capture()
        all_rows = torch.arange(self.tokens.numel(), device=self.device)
        metrics: dict[str, Tensor] = {}
        with torch.no_grad():
            for micro_batch in self.micro_batches:
                rows = self._rows(micro_batch)
                for name, values in self._metrics(micro_batch, rows, self.outputs)[0].items():
                    empty = torch.zeros(len(all_rows), dtype=values.dtype, device=self.device)
                    metrics.setdefault(name, empty)[rows] = values
        leaves = {name: values.requires_grad_() for name, values in metrics.items()}
        loss = self._loss(leaves, all_rows)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        coefficients = {
            name: gradient
            for name, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None
        }
        self.loss += loss.detach()
        self.aux_loss.zero_()
        state.restore()  # the second pass must drop out what the first one did
        for micro_batch in self.micro_batches:
            rows = self._rows(micro_batch)
            found, aux_loss = self._metrics(micro_batch, rows, ())
            parts = [(found[name] * each[rows]).sum() for name, each in coefficients.items()]
            self.update.backward(torch.stack(parts).sum() + aux_loss)

    def _rows(self, micro_batch: MicroBatch) -> Tensor:
        """(C,) int64: which of the update's completions lie in a micro-batch, in its order."""
        rows = [row for index in micro_batch.group_indices for row in self.pieces[index].rows]
        return torch.tensor(rows, device=self.device)

    def _metrics(
        self, micro_batch: MicroBatch, rows: Tensor, outputs: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], Tensor | float]:
        """What the loss may look at of each completion in a micro-batch, and its auxiliary loss.

        Returns:
            (C,) float64 by name; () weighted, for the backward.
        """
        weighing = token_outputs(self.options)
        wanted = (*outputs, *(name for name in weighing if name not in outputs))
        coef = self.update.aux_loss_coef
        with self.update.autocast():
            found = packed_logprobs(self.update.policy, micro_batch, wanted, aux_loss=coef != 0)
        lengths = micro_batch.completion_tokens
        metrics = {"logps": found.logps}
        if self.options.ld_alpha is not None:
            metrics["sums"] = found.logps
            metrics["logps"] = self._ld_logps(found.token_logps, lengths, rows)
        for name in weighing:
            metrics["alignment"] = wpo_alignment(found.token_logps, found.extras[name], lengths)
        self.logps[rows] = metrics["logps"].detach()
        for name in outputs:
            self.token_metrics[name].append(found.extras[name])
        if outputs:
            self.token_rows.append(torch.repeat_interleave(rows, lengths))
        if found.aux_loss is None:
            return metrics, 0.0
        share = micro_batch.num_tokens / self.computed_tokens
        self.aux_loss += share * found.aux_loss.detach()
        return metrics, coef * share * found.aux_loss

    def _ld_logps(self, token_logps: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """(C,) sums in which what lies beyond the shorter completion of a pair counts ld_alpha."""
        assert self.options.ld_alpha is not None, "asked for"
        shared = self.tokens.amin(dim=1)[rows // 2]
        return ld_logps(token_logps, lengths, shared, self.options.ld_alpha)

    def _loss(self, metrics: dict[str, Tensor], rows: Tensor) -> Tensor:
        """(): what the pairs of `rows`, chosen and rejected in turns, add to the update's loss."""
        pairs = rows.view(-1, 2)[:, 0] // 2
        alignment = metrics.get("alignment")
        losses = pair_losses(
            PairLogps(
                logps=metrics["logps"].view(-1, 2),
                ref_logps=self.ref_logps[pairs],
                tokens=self.tokens[pairs],
                chosen_sums=metrics["sums"].view(-1, 2)[:, 0] if "sums" in metrics else None,
                weights=None if alignment is None else wpo_weights(alignment.view(-1, 2)),
            ),
            self.options,
            update_pairs=len(self.groups),
            update_chosen_tokens=self.tokens[:, 0].sum(),
            loss_function=self.update.loss_function,
        )
        return losses.sum() / len(self.groups)

    def _ref_logps(self) -> Tensor:
        """(B, 2) float64: those that the groups bring, or computed on the same micro-batches."""
        if not needs_reference(self.options, self.update.loss_function):
            return torch.zeros_like(self.tokens, dtype=torch.float64)
        known = [group.ref_logps for group in self.groups if group.ref_logps is not None]
        if known:
            assert len(known) == len(self.groups), "known for all groups or for none"
            return torch.from_numpy(np.stack(known)).to(self.device)
        reference = self.update.reference
        logps = torch.zeros(self.tokens.numel(), dtype=torch.float64, device=self.device)
        with (
            reference.active(),
            eval_mode(reference.model),
            torch.no_grad(),
            self.update.autocast(),
            packed_attention(unwrap_model(reference.model).config, self.update.mode.attention),
        ):
            for micro_batch in self.micro_batches:
                rows = self._rows(micro_batch)
                found = packed_logprobs(reference.model, micro_batch)
                if self.options.ld_alpha is None:
                    logps[rows] = found.logps
                else:
                    lengths = micro_batch.completion_tokens
                    logps[rows] = self._ld_logps(found.token_logps, lengths, rows)
        return logps.view(-1, 2)


MOST_ROWS = 8


def nonfinite_reason(
    policy: nn.Module,
    result: UpdateResult,
    groups: Sequence[PromptGroup],
    *,
    check_gradient: bool = True,
) -> str:
    """Look at loss and gradient of one update.

    Args:
        policy: with its gradient.
        result: of the update.
        groups: its B pairs.
        check_gradient: off where a loss scaler looks at the gradient itself.

    Returns:
        What is wrong, to follow "the", with the rows; empty if all is finite.
    """
    if not torch.isfinite(result.loss):
        wrong = ~torch.isfinite(result.logps).all(dim=1)
        named = [g for g, is_wrong in zip(groups, wrong.tolist(), strict=True) if is_wrong]
        return f"loss is {result.loss.item()} ({_rows(named or groups)})"
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    if not check_gradient or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return ""
    return f"gradient is not finite ({_rows(groups)})"


def _rows(groups: Sequence[PromptGroup]) -> str:
    """Which rows of the data set, for people: the first is 1."""
    numbers = sorted(group.row + 1 for group in groups)
    shown = ", ".join(map(str, numbers[:MOST_ROWS]))
    return f"rows {shown}{' and others' if len(numbers) > MOST_ROWS else ''}"

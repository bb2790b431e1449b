"""One update: the gradient of B pairs, whatever micro-batches they fall into.

A loss sees a completion through a few numbers, its terms (the summed log-prob above all), which
gives two ways to one gradient:

    one pass     each micro-batch: forward, the losses of its pairs, backward
    GradCache    forward of all micro-batches without gradients -> the terms of all completions
                 loss of the whole update -> its derivative by each term
                 each micro-batch: forward again, backward from its terms' derivatives

GradCache (L. Gao et al., arXiv:2101.06983) costs one more forward, and needs neither the two
completions of a pair nor the pairs that a loss couples in one micro-batch.

A completion that several pairs hold is computed once: its derivative is the sum of theirs.

Out of memory, the update starts again from no gradient and the same random state in smaller
micro-batches (`run_within_memory`). It stays the same update.

Several ranks share an update: each computes its part of the groups with coefficients of the whole
update, and the gradients are summed up. After that every rank has the gradient and the results of
the whole update.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.batching import MicroBatch, PromptGroup, deal, pack_update
from fastdpo.losses import (
    LossFunction,
    TokenLogps,
    completion_terms,
    couples_pairs,
    needs_reference,
    pair_logps,
    pair_losses,
    term_names,
    token_outputs,
    weighted_logps,
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
from fastdpo.modeling.logprobs import PackedLogprobs, packed_logprobs
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.reference_model import ReferenceModel
from fastdpo.options import LossOptions
from fastdpo.system import ranks
from fastdpo.system.device import to_device
from fastdpo.system.oom import free_cached_memory
from fastdpo.system.rng import RNGState
from fastdpo.trainer.gradient_sum import GradientSum
from fastdpo.trainer.metrics import UpdateResult


class Update:
    """Computes the gradients of updates within the memory that there is.

    Args:
        policy: a causal LM or a PeftModel on one.
        reference: computes the reference log-probs of groups that bring none.
        options: the loss and its parameters.
        layout: bounds the micro-batches, and is lowered where memory runs out.
        mode: how pairs run through the model.
        backward: adds the gradient of a () tensor to the parameters.
        autocast: makes the context around every forward.
        loss_function: takes the place of the built losses; `PairLogps` says what it is given.
        aux_loss_coef: weight of the routers' load-balancing loss, each micro-batch counting by its
            tokens; 0 for models without routers.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: ReferenceModel,
        options: LossOptions,
        *,
        layout: ExecutionLayout,
        mode: PackingMode,
        backward: Callable[[Tensor], None],
        autocast: Callable[[], AbstractContextManager[Any]],
        loss_function: LossFunction | None = None,
        aux_loss_coef: float = 0.0,
    ) -> None:
        self.policy, self.reference, self.options = policy, reference, options
        self.parameters = list(policy.parameters())  # once: a walk over all modules
        self.layout, self.mode = layout, mode
        self.backward, self.autocast = backward, autocast
        self.loss_function, self.aux_loss_coef = loss_function, aux_loss_coef

    def run(self, groups: Sequence[PromptGroup], outputs: tuple[str, ...] = ()) -> UpdateResult:
        """Add the gradient of the mean loss of B pairs to parameters that have none yet.

        Args:
            groups: B groups of a chosen and a rejected completion, the same on every rank.
            outputs: extra per-token metrics, as `linear_logprobs` names them.

        Raises:
            DoesNotFitError: memory runs out with a single completion in a micro-batch.
        """
        state = RNGState.capture()
        distinct, held = distinct_items(groups)

        def undo() -> None:
            self._zero_grad()
            state.restore()

        attempts = run_within_memory(
            distinct,
            self.layout,
            self.mode,
            lay_out=lambda items: [(items, items)],  # the whole update is one unit of work
            work=lambda items: _StepAttempt(self, groups, items, held, outputs).run(),
            undo=undo,
        )
        return next(attempts)

    def probe_memory(self, groups: Sequence[PromptGroup]) -> None:
        """Do all work of an update for its memory alone: no gradient and no RNG draw remains."""
        state = RNGState.capture()
        self.run(groups)
        self._zero_grad()
        free_cached_memory()
        state.restore()

    def _zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """A micro-batch, and which completions of the pairs come out of it."""

    micro_batch: MicroBatch
    indices: Tensor  # (C,) int64, rising
    holds_whole_pairs: bool


class _StepAttempt:
    """One try at one update; a completion's index in it is 2 x pair + (0 chosen, 1 rejected).

    Completions of equal content have an index each, and are computed as one. Until `_join_ranks`
    the results are those of this rank's part alone.
    """

    def __init__(
        self,
        update: Update,
        groups: Sequence[PromptGroup],
        items: Sequence[WorkItem],
        held: Sequence[tuple[int, ...]],
        outputs: tuple[str, ...],
    ) -> None:
        self.update, self.options = update, update.options
        self.groups, self.outputs = groups, outputs
        self.device = unwrap_model(update.policy).device
        self.tokens, self.sums = ranks.agreed(lambda: self._load(self._own(items), held))
        self.token_metrics: dict[str, list[Tensor]] = {name: [] for name in outputs}
        self.token_completions: list[Tensor] = []
        computed = sum(batch.micro_batch.num_tokens for batch in self.batches)
        self.computed_tokens = ranks.total(computed)

    def _own(self, items: Sequence[WorkItem]) -> list[WorkItem]:
        """This rank's part of the items, by their tokens: whole lists, and so whole pairs."""
        lengths = [group_length(item.group, self.update.mode) for item in items]
        shares = deal(lengths, ranks.count(), [item.list for item in items])
        return [items[index] for index in shares[ranks.index()]]

    def _load(
        self, items: Sequence[WorkItem], held: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor]:
        """Pack the items and bring them to the device.

        Returns:
            (B, 2) int64 tokens of all completions; (2 B + 2,) float64 zeros for the results.
        """
        micro_batches = pack_update(
            [item.group for item in items],
            self.update.layout.micro_batch_tokens,
            shared_prefix=self.update.mode.shared_prefix,
            packing=self.update.mode.packing,
            lists=[item.list for item in items],
        )
        distinct = [completion for pair in held for completion in pair]
        self.batches = [self._batch(each, items, distinct) for each in micro_batches]
        lengths = [group.scored_tokens for group in self.groups]
        tokens = to_device(torch.tensor(lengths), self.device)  # (B, 2)
        return tokens, torch.zeros(tokens.numel() + 2, dtype=torch.float64, device=self.device)

    def _batch(
        self, micro_batch: MicroBatch, items: Sequence[WorkItem], distinct: Sequence[int]
    ) -> _Batch:
        """The micro-batch on the device, its completions as the pairs hold them."""
        here = [c for index in micro_batch.group_indices for c in items[index].completions]
        places = {completion: place for place, completion in enumerate(here)}
        indices = [index for index, each in enumerate(distinct) if each in places]
        chosen = micro_batch.select([places[distinct[index]] for index in indices])
        return _Batch(
            chosen.to(self.device),
            to_device(torch.tensor(indices), self.device),
            {index ^ 1 for index in indices} == set(indices),
        )

    @property
    def logps(self) -> Tensor:
        """(2 B,) float64 of all completions; 0 for those of other ranks."""
        return self.sums[:-2]

    @property
    def loss(self) -> Tensor:
        """() float64."""
        return self.sums[-2]

    @property
    def aux_loss(self) -> Tensor:
        """() float64."""
        return self.sums[-1]

    def run(self) -> UpdateResult:
        """Compute the gradient, in one pass where that is enough, else by GradCache."""
        self.ref_logps = self._ref_logps()
        config = unwrap_model(self.update.policy).config
        with packed_attention(config, self.update.mode.attention):
            if couples_pairs(self.options, self.update.loss_function):
                gradients = self._coupled()
            else:
                gradients = ranks.agreed(self._uncoupled)
        self._join_ranks(gradients)
        aux_coef = self.update.aux_loss_coef
        return UpdateResult(
            loss=self.loss + aux_coef * self.aux_loss,
            logps=self.logps.view(-1, 2),
            ref_logps=self.ref_logps,
            tokens=self.tokens,
            token_metrics={name: torch.cat(parts) for name, parts in self.token_metrics.items()},
            token_completions=torch.cat(self.token_completions or [self.tokens.new_empty(0)]),
            computed_tokens=self.computed_tokens,
            aux_loss=self.aux_loss if aux_coef else None,
        )

    def _uncoupled(self) -> GradientSum:
        """Run each micro-batch once if it holds whole pairs, the others twice."""
        for batch in self.batches:
            if batch.holds_whole_pairs:
                self._direct(batch)
        if cached := [batch for batch in self.batches if not batch.holds_whole_pairs]:
            state, aux_loss_before = RNGState.capture(), self.aux_loss.clone()
            everything = torch.cat([batch.indices for batch in cached]).sort().values
            derivatives = self._derivatives(self._terms(cached), everything)
            self.aux_loss.copy_(aux_loss_before)
            state.restore()  # the second pass must drop out what the first one did
            self._second_pass(cached, derivatives)
        return GradientSum(self.update.parameters)

    def _coupled(self) -> GradientSum:
        """Run each micro-batch twice, and between the passes the loss of all ranks' pairs."""
        state = RNGState.capture()
        # Each rank has zeros for the others' completions.
        terms = ranks.summed(ranks.agreed(lambda: self._terms(self.batches)))
        everything = torch.arange(self.tokens.numel(), device=self.device)
        derivatives = self._derivatives(terms, everything)
        if not ranks.is_first():  # every rank has the whole loss, which is summed up later
            self.loss.zero_()
        self.aux_loss.zero_()
        state.restore()

        def second_pass() -> GradientSum:
            self._second_pass(self.batches, derivatives)
            return GradientSum(self.update.parameters)

        return ranks.agreed(second_pass)

    def _direct(self, batch: _Batch) -> None:
        """Forward and backward of one micro-batch that holds whole pairs."""
        terms, aux_loss = self._forward(batch.micro_batch, batch.indices, self.outputs)
        loss = self._loss(terms, batch.indices)
        self.update.backward(loss + aux_loss)
        self.loss.add_(loss.detach())

    def _terms(self, batches: Sequence[_Batch]) -> Tensor:
        """The first pass of GradCache, arXiv:2101.06983: the terms of completions.

        Returns:
            (names, 2 B) float64 without gradient; 0 for completions of other micro-batches.
        """
        names = term_names(self.options)
        size = (len(names), self.tokens.numel())
        found = torch.zeros(size, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in batches:
                terms, _ = self._forward(batch.micro_batch, batch.indices, self.outputs)
                found[:, batch.indices] = torch.stack([terms[name] for name in names])
        return found

    def _derivatives(self, terms: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """Add the loss of some pairs; its derivatives by the terms of all completions, by name."""
        names = term_names(self.options)
        leaves = dict(zip(names, (each.requires_grad_() for each in terms.unbind()), strict=True))
        loss = self._loss({name: leaf[indices] for name, leaf in leaves.items()}, indices)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        self.loss.add_(loss.detach())
        return {
            name: gradient
            for name, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None
        }

    def _second_pass(self, batches: Sequence[_Batch], derivatives: dict[str, Tensor]) -> None:
        """The second pass of GradCache: backward from the derivatives by the terms, (2 B,) each."""
        for batch in batches:
            terms, aux_loss = self._forward(batch.micro_batch, batch.indices, ())
            parts = [(terms[n] * each[batch.indices]).sum() for n, each in derivatives.items()]
            self.update.backward(torch.stack(parts).sum() + aux_loss)

    def _join_ranks(self, gradients: GradientSum) -> None:
        """Give every rank the gradient and the results of the whole update."""
        if ranks.count() == 1:
            return
        self.sums, used = ranks.summed(torch.cat([self.sums, gradients.used])).split(
            [len(self.sums), len(gradients.used)]
        )
        gradients.run(used)
        if not self.outputs:
            return
        columns = [self.token_completions, *self.token_metrics.values()]
        empty = [self.tokens.new_empty(0)]
        mine = torch.stack([torch.cat(parts or empty).double() for parts in columns], dim=1)
        completions, *metrics = ranks.joined(mine).unbind(dim=1)
        self.token_completions = [completions.long()]
        self.token_metrics = {
            name: [each] for name, each in zip(self.outputs, metrics, strict=True)
        }

    def _forward(
        self, micro_batch: MicroBatch, indices: Tensor, outputs: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], Tensor | float]:
        """Run a micro-batch, and keep the log-probs and metrics of its completions.

        Returns:
            The terms of its completions, (C,) float64 by name; its share of the auxiliary loss,
            (), weighted for the backward.
        """
        needed = token_outputs(self.options)
        wanted = (*outputs, *(name for name in needed if name not in outputs))
        coef = self.update.aux_loss_coef
        with self.update.autocast():
            scored = packed_logprobs(self.update.policy, micro_batch, wanted, aux_loss=coef != 0)
        terms = completion_terms(self._token_logps(scored, micro_batch, indices), self.options)
        self.logps[indices] = terms["logps"].detach()
        for name in outputs:
            self.token_metrics[name].append(scored.extras[name])
        if outputs:
            self.token_completions.append(
                torch.repeat_interleave(
                    indices,
                    micro_batch.completion_tokens,
                    output_size=len(scored.token_logps),  # else the host waits to learn it
                )
            )
        if scored.aux_loss is None:
            return terms, 0.0
        share = micro_batch.num_tokens / self.computed_tokens
        self.aux_loss.add_(share * scored.aux_loss.detach())
        return terms, coef * share * scored.aux_loss

    def _token_logps(
        self, scored: PackedLogprobs, micro_batch: MicroBatch, indices: Tensor
    ) -> TokenLogps:
        lengths, pairs = micro_batch.completion_tokens, indices // 2
        return TokenLogps(
            scored.logps, scored.token_logps, lengths, self.tokens[pairs], scored.extras
        )

    def _loss(self, terms: dict[str, Tensor], indices: Tensor) -> Tensor:
        """Return what some pairs add to the update's loss, ().

        Args:
            terms: (C,) each, of those pairs' completions.
            indices: (C,) int64: the completions, chosen and rejected of each pair in turns.
        """
        pairs = indices.view(-1, 2)[:, 0] // 2
        losses = pair_losses(
            pair_logps(terms, self.ref_logps[pairs], self.tokens[pairs]),
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
            return to_device(torch.from_numpy(np.stack(known)), self.device)
        logps = ranks.summed(ranks.agreed(self._computed_ref_logps))
        return logps.view(-1, 2)

    def _computed_ref_logps(self) -> Tensor:
        """(2 B,) float64 under the reference of this rank's completions; 0 for the others."""
        reference = self.update.reference
        logps = torch.zeros(self.tokens.numel(), dtype=torch.float64, device=self.device)
        with (
            reference.active(),
            eval_mode(reference.model),
            torch.no_grad(),
            self.update.autocast(),
            packed_attention(unwrap_model(reference.model).config, self.update.mode.attention),
        ):
            for batch in self.batches:
                scored = packed_logprobs(reference.model, batch.micro_batch)
                token_logps = self._token_logps(scored, batch.micro_batch, batch.indices)
                logps[batch.indices] = weighted_logps(token_logps, self.options)
        return logps

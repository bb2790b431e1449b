"""Every loss and option of TRL 1.16's against TRL's own code, on the same random log-probs."""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastdpo.losses import PairLogps, ld_logps, wpo_alignment, wpo_weights
from fastdpo.options import COUPLED_LOSSES, LOSS_TYPES, LossOptions
from tests.losses.test_losses import mean_loss, options_of

dpo_trainer = pytest.importorskip(
    "trl.trainer.dpo_trainer", reason="the oracle is TRL's own loss (pip install fastdpo[dev])"
)

OURS_ALONE = ("simpo", "orpo", "rso")
TRL_LOSSES = tuple(name for name in LOSS_TYPES if name not in OURS_ALONE)
TRL_CANNOT_WEIGH = ("sft", "hinge")  # it multiplies in place what autograd forbids to change
PAIRS = 7


@dataclass
class Tokens:
    """Ragged log-probs of PAIRS pairs: chosen, rejected in turns; multiples of 2^-10, so that sums
    are exact in float32 too."""

    token_logps: Tensor  # (M,)
    ref_token_logps: Tensor  # (M,)
    log_sum_sq_probs: Tensor  # (M,)
    lengths: Tensor  # (2 PAIRS,)

    @classmethod
    def random(cls, seed: int) -> "Tokens":
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 12, (2 * PAIRS,), generator=generator)
        lengths[:2] = torch.tensor([5, 5])  # a pair without a tail
        total = int(lengths.sum())
        policy, reference, squares = (
            torch.randint(-3072, 0, (total,), generator=generator).double() / 1024 for _ in range(3)
        )
        return cls(policy, reference, squares, lengths)

    def padded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(2 PAIRS, L) in TRL's order: all chosen, then all rejected."""
        rows = values.to(dtype).split(self.lengths.tolist())
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return torch.cat([rows[0::2], rows[1::2]])


def our_loss_and_gradient(tokens: Tokens, options: LossOptions) -> tuple[float, Tensor]:
    token_logps = tokens.token_logps.clone().requires_grad_()
    shared = tokens.lengths.view(-1, 2).amin(dim=1).repeat_interleave(2)
    alpha = 1.0 if options.ld_alpha is None else options.ld_alpha
    summed = partial(ld_logps, completion_tokens=tokens.lengths, shared_tokens=shared)
    alignment = wpo_alignment(token_logps, tokens.log_sum_sq_probs, tokens.lengths)
    pairs = PairLogps(
        summed(token_logps, ld_alpha=alpha).view(-1, 2),
        summed(tokens.ref_token_logps, ld_alpha=alpha).view(-1, 2),
        tokens.lengths.view(-1, 2),
        chosen_sums=summed(token_logps, ld_alpha=1.0).view(-1, 2)[:, 0],
        weights=wpo_weights(alignment.view(-1, 2)),
    )
    loss = mean_loss(pairs, options)
    loss.backward()
    return loss.item(), tokens.padded(token_logps.grad, torch.float64)


def trl_loss_and_gradient(
    tokens: Tokens, options: LossOptions, dtype: torch.dtype
) -> tuple[float, Tensor]:
    """TRL's unbound `_compute_loss` on a trainer that is nothing but its attributes."""
    mask = tokens.padded(torch.ones_like(tokens.token_logps), torch.long)
    prompted = torch.nn.functional.pad(mask, (1, 0))
    log_probs = tokens.padded(tokens.token_logps, dtype).requires_grad_()
    zeros = torch.zeros_like(log_probs)

    def model_of(values: Tensor) -> object:
        squares = tokens.padded(tokens.log_sum_sq_probs, dtype)
        outputs = {"log_sum_sq_probs": squares, "entropy": zeros, "mean_logits": zeros}
        return lambda **_: SimpleNamespace(log_probs=values, is_top1=zeros.bool(), **outputs)

    plain_module = torch.nn.Identity()  # TRL asks it whether it is PEFT's, compiled, checkpointed
    plain_module.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=plain_module,
        ref_model=model_of(tokens.padded(tokens.ref_token_logps, dtype)),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(discopop_tau=options.discopop_tau, gradient_checkpointing_kwargs=None),
        loss_types=options.loss_type,
        loss_weights=options.loss_weights or [1.0] * len(options.loss_type),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    for name in (
        *("beta", "label_smoothing", "ld_alpha", "use_weighting"),
        *("f_divergence_type", "f_alpha_divergence_coef"),
    ):
        setattr(trainer, name, getattr(options, name))
    inputs = {"input_ids": prompted, "attention_mask": prompted, "completion_mask": prompted}
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model_of(log_probs), inputs, False)
    loss.backward()
    return loss.item(), log_probs.grad.double() * mask  # padding has no log-prob to move


def golden_options() -> list[tuple[str, dict]]:
    """Every loss of TRL's with every option that it reads there."""
    scores = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
    cases = [(name, {"beta": beta}) for name, beta in product(TRL_LOSSES, (0.05, 0.3))]
    cases += [
        (name, {"label_smoothing": smoothing})
        for name, smoothing in product(("robust", "exo_pair", "aot", "aot_unpaired"), (0.1, 0.3))
    ]
    cases += [
        (name, {"f_divergence_type": kind})
        for name, kind in product(scores, ("forward_kl", "js_divergence", "alpha_divergence"))
    ]
    cases += [
        (name, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha})
        for name, alpha in product(scores, (0.0, 1.0, 1.5))
    ]
    cases += [
        (name, {"ld_alpha": alpha})
        for name, alpha in product(TRL_LOSSES, (0.0, 0.3, 1.0))
        if name != "sft"
    ]
    cases += [
        (name, {"use_weighting": True, "beta": 0.3})
        for name in TRL_LOSSES
        if name not in (*COUPLED_LOSSES, *TRL_CANNOT_WEIGH)
    ]
    return [*cases, ("discopop", {"discopop_tau": 0.5})]


def agree(ours: tuple[float, Tensor], theirs: tuple[float, Tensor], bound: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=bound, abs=1e-300)
    largest = theirs[1].abs().max().item()
    assert largest > 0
    assert (ours[1] - theirs[1]).abs().max().item() <= bound * largest


@pytest.mark.parametrize(("name", "more"), golden_options(), ids=str)
def test_values_and_gradients_are_those_of_trl(name, more):
    options = options_of(name, **more)
    # TRL takes the exponential of alpha_divergence in float32 alone, and epsilon of exo_pair.
    alpha = options.f_divergence_type == "alpha_divergence"
    dtype = torch.float32 if alpha else torch.float64
    bound = 1e-6 if alpha or name == "exo_pair" else 1e-12
    for seed in range(3):
        tokens = Tokens.random(seed)
        theirs = trl_loss_and_gradient(tokens, options, dtype)
        agree(our_loss_and_gradient(tokens, options), theirs, bound)


@pytest.mark.parametrize(
    "more",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},  # MPO
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.005], "ld_alpha": 0.4},
        {"loss_type": ["ipo", "aot", "sft"], "loss_weights": [0.1, 2.0, 0.0]},
        {"loss_type": ["ipo", "sigmoid"], "use_weighting": True, "loss_weights": [0.5, 3.0]},
        {"loss_type": ["ipo", "sft"], "f_divergence_type": "js_divergence"},
    ],
    ids=str,
)
def test_sums_of_losses_are_those_of_trl(more):
    options = LossOptions(**more)
    for seed in range(3):
        tokens = Tokens.random(seed)
        theirs = trl_loss_and_gradient(tokens, options, torch.float64)
        agree(our_loss_and_gradient(tokens, options), theirs, 1e-12)


def test_discopop_is_finite_where_trl_is_not_a_number():
    tokens = Tokens.random(0)
    tokens.token_logps[:5] -= 1024
    theirs = trl_loss_and_gradient(tokens, options_of("discopop"), torch.float32)
    assert math.isnan(theirs[0]), "TRL has become finite: compare with it"
    ours, gradient = our_loss_and_gradient(tokens, options_of("discopop"))
    assert math.isfinite(ours)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "unweighted"), [("sft", 2.0), ("hinge", 1.5)])
def test_wpo_weighs_by_pair_where_trl_raises(name, unweighted):
    options = options_of(name, use_weighting=True)
    with pytest.raises(RuntimeError, match=r"single memory location|inplace operation"):
        trl_loss_and_gradient(Tokens.random(0), options, torch.float64)
    logps = torch.tensor([[-6.0, -1.0]], dtype=torch.float64)
    pairs = PairLogps(logps, 0 * logps, torch.tensor([[3, 1]]), weights=torch.tensor([0.25]))
    assert mean_loss(pairs, options).item() == pytest.approx(0.25 * unweighted, rel=1e-15)

"""fastdpo.losses: hand-computed values, what an update asks of them, properties."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo.losses import (
    LOSSES,
    PairLogps,
    couples_pairs,
    ld_logps,
    needs_reference,
    pair_losses,
    token_outputs,
    wpo_alignment,
    wpo_weights,
)
from fastdpo.losses.formulas import divergence_scores
from fastdpo.options import COUPLED_LOSSES, LOSS_TYPES, LossOptions


def options_of(loss_type: str, **options) -> LossOptions:
    """The options of one loss, with the smoothing that exo_pair cannot do without."""
    if loss_type == "exo_pair":
        options.setdefault("label_smoothing", 1e-3)
    return LossOptions(loss_type=loss_type, **options)


def mean_loss(pairs: PairLogps, options: LossOptions, **more) -> Tensor:
    update = {
        "update_pairs": len(pairs.logps),
        "update_chosen_tokens": pairs.tokens[:, 0].sum(),
    }
    return pair_losses(pairs, options, **update, **more).sum() / len(pairs.logps)


# By hand: what TRL lacks or gets wrong


def one_pair(chosen: float, rejected: float, tokens=(1, 1), reference=(0.0, 0.0)) -> PairLogps:
    """A pair whose policy log-probs are the leaf."""
    logps = torch.tensor([[chosen, rejected]], dtype=torch.float64, requires_grad=True)
    return PairLogps(
        logps, torch.tensor([reference], dtype=torch.float64), torch.tensor([list(tokens)])
    )


def value_and_slopes(pairs: PairLogps, options: LossOptions) -> tuple[float, list[float]]:
    loss = mean_loss(pairs, options)
    (gradient,) = torch.autograd.grad(loss, pairs.logps)
    return loss.item(), gradient[0].tolist()


@pytest.mark.parametrize(
    ("name", "loss", "slope"),
    [
        ("sigmoid", 0.437488, -0.035434),
        ("hinge", 0.4, -0.1),
        ("rso", 0.4, -0.1),
        ("ipo", 1.0, 2.0),
    ],
)
def test_a_margin_of_six_nats(name, loss, slope):
    found, slopes = value_and_slopes(one_pair(-2.0, -8.0), options_of(name))
    assert found == pytest.approx(loss, abs=1e-6)
    assert slopes == pytest.approx([slope, -slope], abs=1e-6)


def test_label_smoothing_of_sigmoid_is_cdpo():
    pairs = one_pair(-2.0, -8.0)
    loss, slopes = value_and_slopes(pairs, options_of("sigmoid", label_smoothing=0.1))
    # 0.9 x log(1 + e^-0.6) + 0.1 x log(1 + e^0.6); slope 0.1 x (0.1 x 0.645656 - 0.9 x 0.354344)
    assert loss == pytest.approx(0.9 * 0.4374879504 + 0.1 * 1.0374879504, rel=1e-9)
    assert slopes[0] == pytest.approx(-0.025434369, rel=1e-7)
    half = options_of("sigmoid", label_smoothing=0.5)
    assert value_and_slopes(pairs, half)[0] == value_and_slopes(one_pair(-8.0, -2.0), half)[0]
    assert value_and_slopes(one_pair(-3.0, -3.0), half)[1] == [0.0, 0.0]
    # where e is the probability of a wrong label, the minimum is at log((1 - e) / e)
    best = one_pair(10 * math.log(9), 0.0)
    slopes = value_and_slopes(best, options_of("sigmoid", label_smoothing=0.1))[1]
    assert slopes == pytest.approx([0, 0], abs=1e-15)
    for name in ("sigmoid_norm", "simpo"):
        plain, smoothed = (
            value_and_slopes(pairs, options_of(name, label_smoothing=e))[0] for e in (0.0, 0.2)
        )
        assert smoothed != plain


def test_discopop_far_on_the_wrong_side():
    for margin in (-100.0, -1000.0, -1e5):
        loss, slopes = value_and_slopes(one_pair(margin, 0.0), options_of("discopop", beta=1.0))
        assert loss == pytest.approx(-margin, rel=1e-12)
        assert slopes == pytest.approx([-1.0, 1.0], rel=1e-12)


def test_simpo_and_orpo():
    pairs = one_pair(-4.0, -3.0, tokens=(4, 2), reference=(-9.0, 1.0))  # per token -1 and -1.5
    loss, slopes = value_and_slopes(pairs, options_of("simpo", beta=2.0, simpo_gamma=0.5))
    assert loss == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-12)
    assert slopes == pytest.approx([-2 * 0.37754067 / 4, 2 * 0.37754067 / 2], rel=1e-7)
    # Probabilities 1/2 and 1/4 per token: odds 1 and 1/3, ratio 3, sigmoid(log 3) = 3/4.
    pairs = one_pair(3 * math.log(0.5), 2 * math.log(0.25), (3, 2), reference=(-9.0, 1.0))
    loss, slopes = value_and_slopes(pairs, options_of("orpo"))
    assert loss == pytest.approx(-math.log(0.75), rel=1e-12)
    # d log odds / d log p = 1 / (1 - p)
    assert slopes == pytest.approx([-0.25 * 2 / 3, 0.25 * (4 / 3) / 2], rel=1e-12)


def test_divergences_meet_where_they_should():
    logratios = torch.linspace(-30, 30, 13, dtype=torch.float64)
    scores = {
        (kind, alpha): divergence_scores(
            logratios,
            LossOptions(
                f_divergence_type=kind,
                **({"f_alpha_divergence_coef": alpha} if alpha is not None else {}),
            ),
        )
        for kind, alpha in (
            ("reverse_kl", None),
            ("forward_kl", None),
            ("alpha_divergence", 0.0),
            ("alpha_divergence", 1.0),
        )
    }
    assert torch.equal(scores["reverse_kl", None], logratios)
    assert torch.equal(scores["alpha_divergence", 1.0], logratios)
    assert torch.equal(scores["alpha_divergence", 0.0], scores["forward_kl", None])
    torch.testing.assert_close(scores["forward_kl", None], 1 - torch.exp(-logratios))


def test_reference_free_takes_the_reference_as_0():
    for name in LOSS_TYPES:
        pairs = one_pair(-3.0, -7.0, tokens=(2, 3), reference=(-5.0, -4.0))
        free = value_and_slopes(pairs, options_of(name, reference_free=True))
        zero = value_and_slopes(one_pair(-3.0, -7.0, tokens=(2, 3)), options_of(name))
        assert free == zero, name
        differs = zero != value_and_slopes(pairs, options_of(name))
        assert differs is (name not in ("sft", "simpo", "orpo")), name
        assert needs_reference(options_of(name)) is (name not in ("simpo", "orpo")), name
    assert not needs_reference(LossOptions(reference_free=True), lambda pairs: pairs.margins)
    assert needs_reference(options_of("sft"), lambda pairs: pairs.margins)
    assert needs_reference(LossOptions(loss_type=["orpo", "hinge"]))
    assert not needs_reference(LossOptions(loss_type=["sft", "orpo"]))


def test_ld_weighs_the_tail_of_the_longer_completion():
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0], requires_grad=True)
    lengths, shared = torch.tensor([3, 1, 1, 1]), torch.tensor([1, 1, 1, 1])
    weighed = ld_logps(logps, lengths, shared, 0.25)
    assert weighed.dtype == torch.float64
    assert weighed.tolist() == [-1 - 6 / 4, -8, -16, -32]
    weighed.sum().backward()
    assert logps.grad.tolist() == [1, 0.25, 0.25, 1, 1, 1]


def test_wpo_weighs_by_the_policys_own_probabilities():
    logps = torch.tensor([-1.0, -3.0, -0.5], requires_grad=True)
    squares = torch.tensor([-0.5, -1.5, -0.25])
    alignment = wpo_alignment(logps, squares, torch.tensor([2, 1]))
    assert alignment.tolist() == [(-0.5 - 1.5) / 2, -0.25]
    weights = wpo_weights(alignment.view(1, 2))
    assert weights.tolist() == [math.exp(-1.25)]
    assert not weights.requires_grad
    assert not wpo_weights(torch.zeros(1, 2, requires_grad=True)).requires_grad
    assert token_outputs(LossOptions(use_weighting=True)) == ("log_sum_sq_probs",)
    assert token_outputs(LossOptions()) == ()


# The update


def random_pairs() -> PairLogps:
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = -20 * torch.rand(2, 7, 2, dtype=torch.float64, generator=generator)
    return PairLogps(logps, ref_logps, torch.randint(1, 12, (7, 2), generator=generator))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_part_of_an_update_gives_its_part_of_the_losses(name):
    whole, options = random_pairs(), options_of(name)
    update = {"update_pairs": 7, "update_chosen_tokens": whole.tokens[:, 0].sum()}
    part = PairLogps(whole.logps[:3], whole.ref_logps[:3], whole.tokens[:3])
    assert couples_pairs(options) is (name in COUPLED_LOSSES)
    if couples_pairs(options):
        with pytest.raises(ValueError, match="3 of the update's 7 pairs"):
            pair_losses(part, options, **update)
    else:
        all_losses = pair_losses(whole, options, **update)
        assert all_losses.shape == (7,)
        assert torch.equal(pair_losses(part, options, **update), all_losses[:3])


def test_a_loss_of_the_users_own():
    pairs = random_pairs()

    def squared(pairs):
        return (pairs.margins.float() - 1) ** 2

    found = mean_loss(pairs, LossOptions(), loss_function=squared)
    assert found.item() == pytest.approx(((pairs.margins - 1) ** 2).mean().item(), rel=1e-6)
    assert found.dtype == torch.float64
    assert not couples_pairs(LossOptions(loss_type="aot"), squared)
    squared.couples_pairs = True
    assert couples_pairs(LossOptions(), squared)
    for wrong, said in (
        (lambda pairs: pairs.margins.mean(), r"shape \(\) .* 7 pairs"),
        (lambda pairs: pairs.logps, r"shape \(7, 2\)"),
        (lambda pairs: pairs.tokens[:, 0], "int64"),
        (lambda pairs: 1.0, "float"),
    ):
        with pytest.raises(ValueError, match=said):
            mean_loss(pairs, LossOptions(), loss_function=wrong)


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="--use_weighting is on"):
        mean_loss(random_pairs(), LossOptions(use_weighting=True))
    with pytest.raises(ValueError, match="mean_chosen_tokens"):
        LOSSES["sft"](random_pairs(), LossOptions(loss_type="sft"))


# Properties

finite_logps = st.floats(-1e4, 0.0, allow_subnormal=False)
many = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def extreme_pairs(draw) -> PairLogps:
    count = draw(st.integers(1, 4))
    values = draw(st.lists(finite_logps, min_size=4 * count, max_size=4 * count))
    lengths = draw(st.lists(st.integers(1, 50), min_size=2 * count, max_size=2 * count))
    both = torch.tensor(values, dtype=torch.float64).view(2, count, 2)
    return PairLogps(both[0].clone().requires_grad_(), both[1], torch.tensor(lengths).view(-1, 2))


@pytest.mark.parametrize("name", LOSS_TYPES)
@many
@given(extreme_pairs(), st.sampled_from([0.01, 0.1, 1.0, 10.0]))
def test_nothing_overflows(name, pairs, beta):
    smoothing = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1}.get(name, 0.0)
    loss, _ = finite(pairs, options_of(name, beta=beta, label_smoothing=smoothing))
    if name not in ("exo_pair", "robust", "aot", "nca_pair"):
        assert loss >= 0


@many
@given(
    extreme_pairs(),
    st.sampled_from(
        ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "rso"]
    ),
    st.sampled_from(["forward_kl", "js_divergence", "alpha_divergence"]),
)
def test_no_divergence_overflows(pairs, name, kind):
    _, gradient = finite(pairs, options_of(name, f_divergence_type=kind))
    assert gradient.float().isfinite().all(), "the gradient goes on in float32"


def finite(pairs: PairLogps, options: LossOptions) -> tuple[float, Tensor]:
    loss = mean_loss(pairs, options)
    (gradient,) = torch.autograd.grad(loss, pairs.logps)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    return loss.item(), gradient


@pytest.mark.parametrize(
    "name",
    [
        *("sigmoid", "hinge", "bco_pair", "aot", "aot_unpaired", "apo_zero", "sft"),
        *("sigmoid_norm", "simpo", "orpo", "rso"),
    ],
)
@many
@given(extreme_pairs())
def test_more_for_chosen_and_less_for_rejected_is_never_worse(name, pairs):
    _, gradient = finite(pairs, options_of(name))
    assert (gradient[:, 0] <= 0).all()
    assert (gradient[:, 1] >= 0).all()


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "aot"])
@many
@given(extreme_pairs(), st.floats(-1e3, 1e3))
def test_only_the_difference_of_the_rewards_counts(name, pairs, shift):
    options = options_of(name)
    shifted = replace(pairs, logps=pairs.logps + shift)
    torch.testing.assert_close(
        mean_loss(shifted, options), mean_loss(pairs, options), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", COUPLED_LOSSES)
def test_the_order_of_the_pairs_does_not_matter_to_aot(name):
    pairs, options = random_pairs(), options_of(name)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permuted = PairLogps(pairs.logps[order], pairs.ref_logps[order], pairs.tokens[order])
    torch.testing.assert_close(
        mean_loss(permuted, options), mean_loss(pairs, options), rtol=1e-14, atol=0
    )

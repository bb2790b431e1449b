"""Training on completions of several turns: loss and metrics are of the scored tokens alone."""

import copy

import pytest
import torch

from fastdpo.data.chat_template import PLAIN_CHAT_TEMPLATE
from tests.tiny_trainer import TOKENIZER, tiny_base, tiny_trainer

BETA = 0.1


def turns(*texts):
    roles = ("assistant", "user") * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


ROWS = [
    {
        "prompt": [{"role": "user", "content": "Sky?"}],
        "chosen": turns("Blue.", "Why is it so?", "Rayleigh."),
        "rejected": turns("Green.", "No!", "I am very sorry for that.", "Well."),
    },
    {
        "prompt": [{"role": "user", "content": "Sea?"}],
        "chosen": turns("Wet."),
        "rejected": turns("Dry.", "Is it?", "It is."),
    },
]


@pytest.fixture
def models():
    reference, policy = tiny_base(), tiny_base()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return policy, reference


@pytest.fixture
def plain_tokenizer(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", PLAIN_CHAT_TEMPLATE)


def scored(model, prompt_ids, ids, mask):
    """Log-probs and log sum p^2 of the scored tokens, from all logits, float64."""
    sequence = torch.tensor([[*prompt_ids, *ids]])
    with torch.no_grad():
        logps = model(sequence).logits.double().log_softmax(-1)[0]
    places = [i for i in range(len(ids)) if mask is None or mask[i]]
    states = torch.tensor(places) + len(prompt_ids) - 1
    targets = torch.tensor([int(ids[i]) for i in places])
    return logps[states, targets], (2 * logps[states]).logsumexp(-1)


def expected_loss(policy, reference, pairs, ld_alpha=1.0, weighted=False):
    losses = []
    for pair in pairs:
        parts = list(zip(pair.completions, pair.scored, strict=True))
        ours = [scored(policy, pair.prompt_ids, *part) for part in parts]
        base = [scored(reference, pair.prompt_ids, *part)[0] for part in parts]
        shared = min(len(logps) for logps, _ in ours)
        ratios = [
            (logps - ref)[:shared].sum() + ld_alpha * (logps - ref)[shared:].sum()
            for (logps, _), ref in zip(ours, base, strict=True)
        ]
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1]))
        if weighted:
            loss = loss * sum((logps - squares).mean() for logps, squares in ours).exp()
        losses.append(loss)
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    "options",
    [{}, {"ld_alpha": 0.3}, {"use_weighting": True, "packing": "off"}, {"ref_cache": "off"}],
    ids=str,
)
def test_the_loss_is_of_the_scored_tokens(models, plain_tokenizer, tmp_path, options):
    policy, reference = models
    before = copy.deepcopy(policy)
    options = {"ref_cache": str(tmp_path / "cache"), "beta": BETA} | options
    trainer = tiny_trainer(
        policy, tmp_path, tuning="full", rows=ROWS, held_out=None, ref_model=reference,
        score_turns="assistant", **options,
    )  # fmt: skip
    pairs = trainer.train_groups.pairs
    assert [mask is None for pair in pairs for mask in pair.scored] == [False, False, True, False]
    trainer.train()
    first = trainer.state.log_history[0]
    expected = expected_loss(
        before, reference, pairs, options.get("ld_alpha", 1.0), "use_weighting" in options
    )
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    for side, name in enumerate(("chosen", "rejected")):
        assert first[f"lengths/{name}"] == sum(pair.scored_tokens[side] for pair in pairs) / 2
        logps = [
            scored(before, pair.prompt_ids, pair.completions[side], pair.scored[side])[0].sum()
            for pair in pairs
        ]
        if "ld_alpha" not in options:
            assert first[f"logps/{name}"] == pytest.approx(float(sum(logps)) / 2, rel=1e-4)

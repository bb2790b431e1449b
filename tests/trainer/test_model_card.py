"""model_card.py: facts in, Markdown with YAML front matter out; nothing private in it."""

import dataclasses

import pytest
import yaml

from fastdpo import DPOConfig
from fastdpo.trainer.model_card import TAGS, TrainedModel, library_versions, license_of, model_card
from fastdpo.version import __version__
from tests.tiny_trainer import tiny_base, tiny_trainer


@pytest.fixture
def model(tmp_path):
    args = DPOConfig(
        str(tmp_path / "out"), use_cpu=True, beta=0.2, loss_type=["sigmoid", "sft"], max_steps=40,
        per_device_train_batch_size=4, gradient_accumulation_steps=8, learning_rate=5e-6,
        ref_cache=str(tmp_path / "private"), hub_token="hf_private", lr_scheduler_type="cosine",
    )  # fmt: skip
    return TrainedModel(
        name="zephyr-dpo",
        base_model="org/zephyr",
        is_adapter=True,
        reference="The reference is the model with its adapter off.",
        args=args,
        pairs=61_135,
        pairs_seen=1_280,
        adapter="LORA, rank 16, alpha 32",
        updates=40,
        dataset="org/feedback",
        evaluation={"eval_loss": 0.61234567, "eval_rewards/accuracies": 0.75, "eval_runtime": 9.0,
                    "eval_pairs_per_second": 3.0, "epoch": 1.0},
        command=["python", "-m", "fastdpo.train", "--hub_token", "hf_private", "--beta", "0.2",
                 "--hub-token=hf_private", "--run_name", "a b"],
        tags=("zephyr", "dpo"),
        versions=library_versions(),
    )  # fmt: skip


def front_matter(card):
    start, matter, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


def test_a_card_tells_what_was_trained_on_what_and_how(model):
    card = model_card(model)
    assert front_matter(card) == {
        "library_name": "peft", "base_model": "org/zephyr", "datasets": ["org/feedback"],
        "pipeline_tag": "text-generation", "tags": [*TAGS, "zephyr"],
    }  # fmt: skip
    for text in (
        "# zephyr-dpo",
        "An adapter for `org/zephyr`, aligned with 1,280 of 61,135 preference pairs of "
        "`org/feedback` in 40 updates",
        "| base model | org/zephyr |\n| pairs seen | 1,280 |",
        "| adapter | LORA, rank 16, alpha 32 |",
        "The reference is the model with its adapter off.",
        "| loss_type | sigmoid sft |",
        "| beta | 0.2 |",
        "| pairs per update | 32 |",
        "| max_steps | 40 |",
        "| learning_rate | 5e-06 |",
        "| lr_scheduler_type | cosine |",
        "| loss | 0.6123 |",
        "| rewards/accuracies | 0.75 |",
        "python -m fastdpo.train --beta 0.2 --run_name 'a b'\n",
        f"| fastdpo | {__version__} |",
        "arXiv:2305.18290",
        "@inproceedings{rafailov2023direct",
    ):
        assert text in card, text
    assert "num_train_epochs" not in card
    assert "runtime" not in card
    assert "per_second" not in card


def test_what_is_private_stays_out(model, tmp_path):
    folder = tmp_path / "secret" / "base"
    folder.mkdir(parents=True)
    local = dataclasses.replace(
        model, base_model=str(folder), dataset=str(tmp_path / "pairs.jsonl"), tags=()
    )
    for card in (model_card(model), model_card(local)):
        assert "hf_private" not in card
        assert str(tmp_path) not in card
    assert front_matter(model_card(local)).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "An adapter for `base`" in card
    assert "of `pairs.jsonl` in" in card


def test_what_is_not_known_is_left_out(model):
    bare = model_card(
        dataclasses.replace(
            model, is_adapter=False, dataset=None, evaluation={}, command=(), versions={}
        )
    )
    assert front_matter(bare)["library_name"] == "transformers"
    assert (
        "All weights of `org/zephyr`, aligned with 1,280 of 61,135 preference pairs in 40" in bare
    )
    unnamed = model_card(dataclasses.replace(model, base_model=""))
    assert "An adapter for a model that has no name, aligned" in unnamed
    assert "base_model" not in front_matter(unnamed)
    for heading in ("## Evaluation", "## Command", "## Versions"):
        assert heading not in bare
        assert heading in model_card(model)


def test_options_that_are_as_they_come_are_not_listed(model):
    plain = dataclasses.replace(model, args=DPOConfig(use_cpu=True))
    card = model_card(plain)
    for name in ("ref_cache", "reference |", "label_smoothing", "micro_batch_tokens"):
        assert name not in card
    assert "| num_train_epochs | 3.0 |" in card
    assert "| max_length | 1024 |" in card
    other = DPOConfig(use_cpu=True, label_smoothing=0.1, micro_batch_tokens=256)
    card = model_card(dataclasses.replace(plain, args=other))
    assert "| label_smoothing | 0.1 |" in card
    assert "| micro_batch_tokens | 256 |" in card


@pytest.mark.parametrize("where", ["name", "base_model", "dataset", "reference", "command", "run"])
def test_a_name_stays_on_its_line_and_in_its_place(model, tmp_path, where):
    """A folder's name may hold anything; what follows its newline is no Markdown of the card."""
    name = "x\n\n# Free\n```\n---\nlicense: mit\n---\n<img src=x>\x1b[2J`"
    value = {"command": ["train", name], "reference": f"The reference is {name}."}.get(where, name)
    if where == "run":
        changed = dataclasses.replace(model, args=DPOConfig(use_cpu=True, loss_type=["sigmoid"]))
        changed.args.optim = name
    else:
        changed = dataclasses.replace(model, **{where: value})
    card = model_card(changed)
    plain = model_card(model)
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert "# Free" not in headings
    assert len(headings) == sum(line.startswith("#") for line in plain.splitlines())
    assert card.count("\n```") == plain.count("\n```")
    assert front_matter(card).get("license") is None
    assert "\x1b" not in card


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\n---\n# It", "mit"),
        ("---\ntags: [it]\n---\n# It", None),
        ("# It", None),
        ("---\nlicense: [a, b\n---\n", None),
        (None, None),
    ],
)
def test_the_license_is_that_which_the_card_of_the_base_names(model, tmp_path, card, found):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == found
    text = model_card(dataclasses.replace(model, license=license_of(str(tmp_path))))
    assert ("under its license, mit." in text) == (found == "mit")
    assert front_matter(text).get("license") == found
    assert ("which is not known here" in text) == (found is None)


@pytest.mark.parametrize("name", ["org/no-such-model-here", "no/name/of a hub", ""])
def test_without_a_card_no_license_is_known(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert license_of(name) is None


@pytest.mark.parametrize(
    ("options", "seen", "shown"),
    [
        ({"max_steps": 2}, "16", "16 of 35 preference pairs"),
        ({"num_train_epochs": 2}, "70", "with 35 preference pairs"),
    ],
)
def test_the_card_of_a_run_counts_the_pairs_that_were_seen(
    tmp_path, monkeypatch, options, seen, shown
):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    trainer = tiny_trainer(tiny_base(), tmp_path / "out", **options)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| pairs seen | {seen} |" in card
    assert shown in card
    assert "| adapter | LORA, rank 4, alpha 8 |" in card

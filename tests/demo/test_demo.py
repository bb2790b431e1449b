import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.data import prepare_pairs, read_rows
from fastdpo.demo import build, language
from fastdpo.demo.build import Demo, Recipe, make_demo
from fastdpo.demo.language import GRUFF, KIND, Request, kindness, pair_of, speak, split_requests
from fastdpo.options import TokenizationOptions

SMALL = Recipe(updates=150, texts_per_update=24, train_pairs=8, dev_pairs=4, prompts_per_batch=60)
ELF = Request("Elf", "hot", "soup")
HAPPY = " Gladly! Enjoy hot soup, dear elf."
NAMES = ("train.jsonl", "dev.jsonl", "demo.json", "model/model.safetensors", "model/tokenizer.json")


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Demo, list[str]]:
    """A small demo, its report, and the proof that nobody's dice were touched."""
    lines: list[str] = []
    before = random_states()
    made = make_demo(tmp_path_factory.mktemp("demo"), seed=3, report=lines.append, recipe=SMALL)
    assert random_states() == before
    return made, lines


@pytest.fixture(scope="module")
def tokenizer(made):
    return AutoTokenizer.from_pretrained(made[0].model_dir, local_files_only=True)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    if "<" not in text:
        assert ids[1:] == list(text.encode())
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_that_is_loaded_is_the_one_that_was_made(tokenizer):
    fresh = build.make_tokenizer()
    assert len(tokenizer) == len(fresh) == 259
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    batch = ["<s> a  b .</s>", "\u00e9\U0001f600\r\n\t\x00"]
    assert tokenizer(batch).input_ids == fresh(batch).input_ids
    assert tokenizer(batch, padding=True).input_ids[0][0] == tokenizer.pad_token_id


def test_the_model_loads_and_suits_the_tokenizer_and_four_bit_layers(made, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(made[0].model_dir, local_files_only=True)
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert all(linear.out_features % 32 == 0 for linear in linears)


def test_requests_are_split_without_overlap():
    train, held_out = split_requests(0)
    assert len(train) == 900
    assert len({request.prompt for request in train + held_out}) == 1200
    assert split_requests(1) != (train, held_out)


def test_the_grammar_accepts_what_it_speaks_and_both_tones_alike():
    rng = random.Random(0)
    requests = split_requests(0)[0]
    scores = [kindness(request, speak(request, rng)) for request in requests * 4]
    assert set(scores) == {-3, 3}
    assert abs(sum(scores)) < 0.1 * 3 * len(scores)
    for kind, gruff in zip(KIND, GRUFF, strict=True):
        assert [len(word) for word in kind] == [len(word) for word in gruff]
    longest = max(len(speak(request, rng)) for request in requests)
    assert longest < build.MAX_COMPLETION_TOKENS


@pytest.mark.parametrize(
    "junk",
    [
        "",
        HAPPY[1:],
        HAPPY[:-1],
        HAPPY[:-1] + "!",
        HAPPY + " ",
        HAPPY + "\n",
        HAPPY.replace("hot", "cold"),
        HAPPY.replace("soup", "tea"),
        HAPPY.replace("elf", "king"),
        HAPPY.replace("dear", "dead"),
        HAPPY.replace("Enjoy", "Gladly!"),
        HAPPY * 2,
    ],
)
def test_the_grammar_rejects_junk(junk):
    assert kindness(ELF, HAPPY) == 3
    assert kindness(ELF, junk) is None


def test_the_kindest_is_paired_with_the_gruffest():
    mixed = " Gladly! Skip hot soup, rude elf."
    gruff = " Humbug! Skip hot soup, rude elf."
    assert kindness(ELF, mixed) == -1
    row = {"prompt": "Elf: Hot soup?\nHost:", "chosen": HAPPY, "rejected": gruff}
    assert pair_of(ELF, [mixed, gruff, "junk", HAPPY]) == row
    assert pair_of(ELF, [HAPPY, HAPPY, HAPPY.replace("dear", "good")]) is None
    assert pair_of(ELF, ["junk", gruff]) is None
    assert pair_of(ELF, ["junk"]) is None


def test_the_rows_are_pairs_of_the_language_and_held_out_prompts_are_new(made, tokenizer):
    train, dev = rows_of(made[0].train_file), rows_of(made[0].dev_file)
    assert (len(train), len(dev)) == (SMALL.train_pairs, SMALL.dev_pairs)
    requests = {request.prompt: request for part in split_requests(3) for request in part}
    for row in train + dev:
        request = requests[row["prompt"]]
        assert kindness(request, row["chosen"]) > kindness(request, row["rejected"])
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in dev}
    assert made[0].prompt in {row["prompt"] for row in dev}
    rows = read_rows(str(made[0].train_file))
    dropped = prepare_pairs(rows, tokenizer, TokenizationOptions(max_length=128))
    assert len(dropped) == len(train)


def test_the_same_seed_makes_the_same_files(made, tmp_path):
    torch.manual_seed(99)
    random.seed(99)
    again = make_demo(tmp_path, seed=3, report=lambda line: None, recipe=SMALL)
    for name in NAMES:
        first = made[0].model_dir.parent / name
        assert first.read_bytes() == (tmp_path / name).read_bytes(), name
    assert again.prompt == made[0].prompt
    assert {path.name for path in tmp_path.iterdir()} == {name.split("/")[0] for name in NAMES}


def test_every_phase_is_reported_with_its_time(made):
    teaching, taught, pairs = made[1]
    assert "teaching a Llama of" in teaching
    assert "taught it 3,600 lines in" in taught
    assert "8 to train on, 4 held out" in pairs


def test_a_complete_demo_is_reused_and_another_is_made_anew(made, monkeypatch):
    folder, lines = made[0].model_dir.parent, []

    def refuse(*arguments):
        raise InterruptedError

    monkeypatch.setattr(build, "_make", refuse)
    assert make_demo(folder, seed=3, report=lines.append, recipe=SMALL) == made[0]
    assert len(lines) == 1
    assert "reusing" in lines[0]
    with pytest.raises(InterruptedError):
        make_demo(folder, seed=4, report=lines.append, recipe=SMALL)
    with pytest.raises(InterruptedError):
        make_demo(folder, seed=3, report=lines.append)
    monkeypatch.setattr(build, "FORMAT", build.FORMAT + 1)
    with pytest.raises(InterruptedError):
        make_demo(folder, seed=3, report=lines.append, recipe=SMALL)


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"format": 1', "\xff"])
def test_a_broken_marker_is_no_demo(tmp_path, marker):
    (tmp_path / "demo.json").write_text(marker, encoding="latin-1")
    assert build._finished_prompt(tmp_path, SMALL) is None


def test_an_interrupted_demo_is_made_anew(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_teach", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_demo(tmp_path, report=lambda line: None, recipe=SMALL)
    for name in ("train.jsonl", "dev.jsonl", "model"):
        (tmp_path / name).touch()
    assert build._finished_prompt(tmp_path, SMALL) is None


def test_files_that_are_not_a_demos_are_left_alone(tmp_path):
    (tmp_path / "train.jsonl").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds train\.jsonl but no demo\.json"):
        make_demo(tmp_path, report=lambda line: None, recipe=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_model_that_was_taught_too_little_is_refused(tmp_path):
    recipe = Recipe(updates=1, texts_per_update=1, samples_per_prompt=1, prompts_per_batch=20)
    requests = split_requests(0)[0][:20]
    tokenizer = build.make_tokenizer()
    model = build._teach(tokenizer, requests, recipe, lambda line: None)
    with pytest.raises(RuntimeError, match="after 1 updates of teaching; more are needed"):
        build._pairs(model, tokenizer, requests, 1, recipe)


def test_the_language_needs_nothing_heavy():
    assert not {"torch", "transformers"} & set(vars(language))

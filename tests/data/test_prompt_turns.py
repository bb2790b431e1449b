"""Prompts of turns that are too long lose the oldest ones; system turn, headers, last turn stay."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.data import prepare_pairs, rows_from
from fastdpo.data.chat_template import PLAIN_CHAT_TEMPLATE
from fastdpo.data.prompt_turns import PromptTurns, keep_turns
from fastdpo.options import TokenizationOptions
from tests.tiny_trainer import TOKENIZER

CHATML = (
    "{% if messages[0].role != 'system' %}<|im>system\nHelp.<|end>\n{% endif %}"
    "{% for m in messages %}<|im>{{ m.role }}\n{{ m.content | trim }}<|end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im>assistant\n{% endif %}"
)
INST = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>' ~ messages[0].content ~ '<</SYS>>' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ (system if loop.first else '') ~ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [("user", "First question?"), ("assistant", "First answer."), ("user", "Second question?"),
        ("assistant", "Second answer."), ("user", "Third question?")]  # fmt: skip


def turns(*talk, system=True):
    return [SYSTEM] * system + [{"role": role, "content": content} for role, content in talk]


def prompt_of(messages, template, limit, **options):
    """The prompt as text, of a row whose prompt may have so many tokens, which are bytes."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    answers = ({"role": "assistant", "content": text} for text in ("Yes.", "Nope."))
    row = dict(zip(("chosen", "rejected"), ([each] for each in answers), strict=True))
    row["prompt"] = messages
    options = TokenizationOptions(max_prompt_length=limit, **options)
    pairs = prepare_pairs(rows_from([row], "rows"), tokenizer, options, progress=False)
    assert len(pairs[0].prompt_ids) <= limit
    assert pairs.report.truncated_prompts == pairs[0].cut[0]
    return tokenizer.decode(pairs[0].prompt_ids)


def rendered(messages, template):
    tokenizer = copy.deepcopy(TOKENIZER)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("template", [CHATML, INST, PLAIN_CHAT_TEMPLATE])
@pytest.mark.parametrize("kept", [5, 3, 1])
def test_whole_turns_are_left_out_as_if_they_had_never_been(template, system, kept):
    """What is left is what the template makes of the system turn and the last turns."""
    wanted = rendered(turns(*TALK[-kept:], system=system), template)
    found = prompt_of(turns(*TALK, system=system), template, len(wanted))
    assert found == wanted
    assert prompt_of(turns(*TALK, system=system), template, len(wanted) + 9) == wanted


def test_of_a_last_turn_that_is_too_long_the_end_stays():
    talk = turns(("user", "One?"), ("assistant", "1."), ("user", "x" * 90 + "tail"))
    found = prompt_of(talk, CHATML, 80)
    assert found.startswith("<|im>system\nBe brief.<|end>\n<|im>user\nxxx")
    assert found.endswith("xtail<|end>\n<|im>assistant\n")
    assert len(found) == 80


def test_a_default_system_turn_of_the_template_stays():
    found = prompt_of(turns(("user", "x" * 90 + "tail"), system=False), CHATML, 70)
    assert found.startswith("<|im>system\nHelp.<|end>\n<|im>user\nxxx")


def test_a_long_system_turn_loses_its_left_and_keeps_its_header():
    talk = [{"role": "system", "content": "s" * 300 + "rule"}, *turns(*TALK, system=False)]
    found = prompt_of(talk, CHATML, 100)
    assert found.startswith("<|im>system\nsss")
    assert "srule<|end>\n<|im>user\nThird question?<|end>\n" in found
    talk[-1]["content"] = "x" * 300 + "tail"  # both are too long, and share what there is
    found = prompt_of(talk, CHATML, 90)
    assert "srule<|end>\n<|im>user\nx" in found
    assert found.endswith("xtail<|end>\n<|im>assistant\n")


def test_the_quarter_of_keep_completion_is_taken_of_turns_too():
    """The completions want all of max_length, and the prompt keeps a quarter, in turns."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = CHATML
    row = {"prompt": turns(*TALK)} | {
        side: [{"role": "assistant", "content": letter * 400}]
        for side, letter in (("chosen", "c"), ("rejected", "r"))
    }
    options = TokenizationOptions(max_length=320)
    (pair,) = prepare_pairs(rows_from([row], "rows"), tokenizer, options, progress=False)
    assert tokenizer.decode(pair.prompt_ids) == rendered(turns(TALK[-1]), CHATML)
    assert len(pair.prompt_ids) <= 80
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == 320


@pytest.mark.parametrize("form", ["text", "turns"])
def test_a_prompt_longer_than_max_length_is_cut_and_not_dropped(form):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = CHATML
    text = {"prompt": "x" * 90 + "tail", "chosen": " yes", "rejected": " no"}
    talk = {
        "prompt": turns(("user", text["prompt"])),
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    rows = rows_from([text if form == "text" else talk], "rows")
    options = TokenizationOptions(max_length=80)
    (pair,) = prepare_pairs(rows, tokenizer, options, progress=False)
    prompt, chosen = (tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids))
    assert "xtail" in prompt
    assert "yes" in chosen
    assert pair.cut == (True, False, False)


def test_without_room_for_the_headers_the_left_is_cut():
    found = prompt_of(turns(*TALK), CHATML, 30)
    assert found == rendered(turns(*TALK), CHATML)[-30:]


def test_an_objection_of_the_template_to_other_words_cuts_the_left():
    strict = CHATML + "{% if '\ue000' in (messages | map(attribute='content') | join) %}{{ 1/0 }}"
    found = prompt_of(turns(*TALK), strict + "{% endif %}", 100)
    assert found == rendered(turns(*TALK), CHATML)[-100:]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_kept_is_in_order_and_no_more_than_asked_for(data):
    places = sorted(data.draw(st.lists(st.integers(0, 30), min_size=3, max_size=6)))
    prompt = list(range(places[-1] + data.draw(st.integers(1, 20))))
    turns_found = PromptTurns((places[0], places[1]), places[2], tuple(places[3:]))
    keep = data.draw(st.integers(1, len(prompt)))
    kept = keep_turns(prompt, keep, turns_found)
    if kept is None:
        return
    assert 1 <= len(kept) <= keep
    assert kept == sorted(set(kept))
    assert kept[-1] == prompt[-1]
    opening, header = range(places[0]), range(places[1], places[2])
    assert {*opening, *header} <= set(kept)

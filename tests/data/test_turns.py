"""data/turns.py: which tokens of a completion of several turns are scored."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastdpo.batching import PairGroups, pack_update
from fastdpo.batching.pack import pack_in_order
from fastdpo.data import DataError, prepare_pairs, rows_from
from fastdpo.data.chat_template import PLAIN_CHAT_TEMPLATE
from fastdpo.data.pairs import NOTHING_SCORED
from fastdpo.data.preview import show_pairs
from fastdpo.options import TokenizationOptions
from fastdpo.ref_cache.store import group_keys, row_key
from tests.data.test_trl_ids import WEATHER, message, theirs


def call(name, city):
    arguments = {"city": city}
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return message("assistant", "", tool_calls=calls)


QUESTION = [message("system", "Be brief."), message("user", "Is it warmer in Oslo or in Rome?")]
CHOSEN = [
    call("weather", "Oslo"),
    message("tool", "4 degrees"),
    message(
        "assistant", "Oslo is cold. Now Rome.", tool_calls=call("weather", "Rome")["tool_calls"]
    ),
    message("tool", "16 degrees"),
    message("assistant", "It is warmer in Rome."),
]
REJECTED = [message("assistant", "I do not know.")]
TOOLS = [WEATHER]
AGENTIC = {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED, "tools": json.dumps(TOOLS)}
TALK = {
    "prompt": [message("user", "Hello!")],
    "chosen": [
        message("assistant", "Hi. What is up?"),
        message("user", "Nothing.\n\nYou?"),
        message("assistant", "I am fine."),
    ],
    "rejected": [
        message("assistant", "Hi."),
        message("user", "Well?"),
        message("assistant", "What?\nWhy?"),
        message("user", "Bye."),
    ],
}


def call_text(city):
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


THOUGHTS = "<think>\n\n</think>\n\n"
OSLO, ROME = call_text("Oslo"), f"Oslo is cold. Now Rome.\n{call_text('Rome')}"
END = "<|im_end|>\n"
SCORED = {
    None: [OSLO + END, ROME + END, "It is warmer in Rome." + END],
    "qwen2_5": [OSLO + END, ROME + END, "It is warmer in Rome." + END],
    "qwen3": [OSLO + END, ROME + END, THOUGHTS + "It is warmer in Rome." + END],
    "qwen3_training": [
        THOUGHTS + OSLO + END,
        THOUGHTS + ROME + END,
        THOUGHTS + "It is warmer in Rome." + END,
    ],
}
"""By template (None: minimind's own), what the assistant writes in CHOSEN.

Empty thoughts are the policy's where the generation prompt does not give them, as minimind's does.
"""


@pytest.fixture
def tokenizer_with(shared_data):
    def make(template):
        tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/minimind_chatml")
        if template == "plain":
            tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        elif template is not None:
            path = shared_data / f"templates/{template}.jinja"
            tokenizer.chat_template = path.read_text()
        return tokenizer

    return make


def prepare(tokenizer, *rows, score_turns="assistant", **options):
    options = TokenizationOptions(**({"max_length": None} | options), score_turns=score_turns)
    return prepare_pairs(rows_from(list(rows), "rows"), tokenizer, options, progress=False)


def scored_texts(tokenizer, ids, mask):
    """The runs of scored tokens, decoded."""
    mask = np.ones(len(ids), dtype=bool) if mask is None else mask
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in edges]


@pytest.mark.parametrize("template", SCORED)
def test_of_a_tool_conversation_only_the_assistants_tokens_are_scored(tokenizer_with, template):
    tokenizer = tokenizer_with(template)
    pairs = prepare(tokenizer, AGENTIC)
    (pair,) = pairs
    assert scored_texts(tokenizer, pair.chosen_ids, pair.scored[0]) == SCORED[template]
    assert pair.scored[1] is None
    whole = prepare(tokenizer, AGENTIC, score_turns="all")
    (everything,) = whole
    assert everything.scored == (None, None)
    parts = (pair.prompt_ids, *pair.completions)
    assert [ids.tolist() for ids in parts] == [
        ids.tolist() for ids in (everything.prompt_ids, *everything.completions)
    ]
    assert [ids.tolist() for ids in parts] == list(theirs(tokenizer, [AGENTIC])[0])
    share = sum(pair.scored_tokens) / sum(map(len, pair.completions))
    assert f"{share:.1%} of the completion tokens are scored" in pairs.report.describe()
    assert "100% of the completion tokens are scored" in whole.report.describe()
    scored = f"{len(pair.chosen_ids):,} tokens, {pair.scored_tokens[0]:,} of them scored:"
    assert scored in show_pairs(pairs, tokenizer, color=False)
    assert "scored" not in show_pairs(whole, tokenizer, color=False)


def test_markers_and_rendering_turn_by_turn_agree(tokenizer_with):
    """qwen2_5_training is qwen2_5 with markers, which take in the newline before a call."""
    tokenizer = tokenizer_with("qwen2_5")
    for row in (AGENTIC, TALK):
        (marked,), (rendered,) = (
            prepare(tokenizer_with(name), row) for name in ("qwen2_5_training", "qwen2_5")
        )
        for ids, one, other in zip(marked.completions, marked.scored, rendered.scored, strict=True):
            assert [text.lstrip("\n") for text in scored_texts(tokenizer, ids, one)] == (
                scored_texts(tokenizer, ids, other)
            )


@pytest.mark.parametrize("template", [*SCORED, "phi3_training", "plain"])
def test_user_turns_are_not_scored(tokenizer_with, template):
    tokenizer = tokenizer_with(template)
    (pair,) = prepare(tokenizer, TALK)
    for ids, mask, turns in zip(
        pair.completions, pair.scored, (TALK["chosen"], TALK["rejected"]), strict=True
    ):
        texts = scored_texts(tokenizer, ids, mask)
        spoken = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert len(texts) == len(spoken)
        for text, words in zip(texts, spoken, strict=True):
            assert words in text
            assert "user" not in text.lower()
            rest = text.replace(words, "").replace(THOUGHTS, "").replace("<|im_end|>", "")
            assert rest.replace("<|end|>", "").replace("<|endoftext|>", "").strip() == ""


@pytest.mark.parametrize("template", ["phi3", "phi3_training"])
def test_a_template_that_shows_no_tool_turn_is_refused(tokenizer_with, template):
    with pytest.raises(
        DataError, match=r"rows.*leaves out the turn of the role 'assistant' and its tool calls"
    ):
        prepare(tokenizer_with(template), AGENTIC)


def test_a_template_that_refuses_part_of_a_conversation_says_so(tokenizer_with):
    tokenizer = tokenizer_with("qwen2_5")
    check = "{%- if messages|length == 2 %}{{ raise_exception('too short') }}{% endif %}"
    tokenizer.chat_template = check + tokenizer.chat_template
    with pytest.raises(DataError, match=r"up to turn 2, .*too short.*pass --score_turns all"):
        prepare(tokenizer, TALK)


def test_a_template_that_does_not_tell_where_a_turn_ends_is_refused(tokenizer_with):
    with pytest.raises(DataError, match=r"before turn 2 otherwise once further ones follow"):
        prepare(tokenizer_with("phi3"), TALK)
    (pair,) = prepare(tokenizer_with("phi3"), TALK, score_turns="all")
    assert pair.scored == (None, None)


def test_a_template_that_rewrites_earlier_turns(tokenizer_with):
    """qwen3 drops the thoughts of turns before the last question: found for one, not for two."""
    tokenizer = tokenizer_with("qwen3")
    thoughtful = message("assistant", "<think>\nhm\n</think>\n\nHi.")
    talk = [thoughtful, message("user", "And?"), message("assistant", "Good.")]
    (pair,) = prepare(tokenizer, TALK | {"chosen": talk})
    texts = scored_texts(tokenizer, pair.chosen_ids, pair.scored[0])
    assert texts == ["Hi." + END, THOUGHTS + "Good." + END]
    with pytest.raises(DataError, match=r"before turn 4 otherwise once further ones follow"):
        prepare(tokenizer, TALK | {"chosen": [thoughtful, message("tool", "4"), *talk]})


def test_special_tokens_in_the_content_move_nothing(tokenizer_with):
    tokenizer = tokenizer_with("qwen2_5")
    spelled = [*CHOSEN[:3], message("tool", "<|im_end|> 16"), message("assistant", "<|im_end|>?")]
    (pair,) = prepare(tokenizer, AGENTIC | {"chosen": spelled})
    texts = scored_texts(tokenizer, pair.chosen_ids, pair.scored[0])
    assert texts == [OSLO + END, ROME + END, "<|im_end|>?" + END]


def test_cut_completions_keep_their_mask(tokenizer_with):
    tokenizer = tokenizer_with("qwen2_5")
    (whole,), (cut,) = (
        prepare(tokenizer, AGENTIC, max_completion_length=most) for most in (None, 60)
    )
    assert cut.scored[0].tolist() == whole.scored[0][:60].tolist()
    report = prepare(
        tokenizer, AGENTIC, AGENTIC | {"chosen": [message("tool", "16 degrees")]}
    ).report
    assert report.dropped[NOTHING_SCORED].count == 1


def test_a_single_answer_is_the_same_either_way(tokenizer_with):
    row = TALK | {side: TALK[side][:1] for side in ("chosen", "rejected")}
    for template in SCORED:
        tokenizer = tokenizer_with(template)
        assistant, everything = (
            PairGroups(prepare(tokenizer, row, score_turns=way)) for way in ("assistant", "all")
        )
        assert assistant.content_hash == everything.content_hash
        assert group_keys(assistant[0]) == group_keys(everything[0])
        assert not assistant.pairs.masks


def test_keys_and_hashes_tell_the_scored_tokens(tokenizer_with):
    tokenizer = tokenizer_with("qwen2_5")
    scored, everything = (
        PairGroups(prepare(tokenizer, AGENTIC, score_turns=way)) for way in ("assistant", "all")
    )
    assert scored.content_hash != everything.content_hash
    ours, theirs_ = group_keys(scored[0]), group_keys(everything[0])
    assert ours[0] != theirs_[0]
    assert ours[1] == theirs_[1]
    ids, mask = everything[0].completions[0], scored.pairs[0].scored[0]
    assert row_key(scored[0].prompt_ids, ids, mask) == ours[0]
    assert row_key(scored[0].prompt_ids, ids, np.ones_like(mask)) == theirs_[0]


@pytest.mark.parametrize("layout", [{}, {"shared_prefix": False}, {"packing": False}])
def test_every_layout_scores_the_masked_tokens_and_no_other(tokenizer_with, layout):
    pairs = prepare(tokenizer_with("qwen2_5"), AGENTIC, TALK, AGENTIC)
    groups = list(PairGroups(pairs))
    batches = [*pack_update(groups, 4096, **layout), *pack_in_order(groups, 4096, **layout)]
    for batch in batches:
        ends = batch.completion_tokens.cumsum(0)[:-1]
        targets = batch.target_ids[batch.token_index].tensor_split(ends)
        states = batch.scored_positions[batch.token_index].tensor_split(ends)
        expected = [
            (ids, mask)
            for index in batch.group_indices
            for ids, mask in zip(groups[index].completions, groups[index].masks, strict=True)
        ]
        flat_ids, flat_positions = batch.input_ids.flatten(), batch.position_ids.flatten()
        lengths = [len(groups[index].prompt_ids) for index in batch.group_indices for _ in range(2)]
        for target, state, (ids, mask), prompt in zip(
            targets, states, expected, lengths, strict=True
        ):
            mask = np.ones(len(ids), dtype=bool) if mask is None else mask
            assert target.tolist() == ids[mask].tolist()
            places = np.flatnonzero(mask)
            assert flat_positions[state].tolist() == (places + prompt - 1).tolist()
            inside = places > 0
            assert flat_ids[state].numpy()[inside].tolist() == ids[places[inside] - 1].tolist()
    assert pairs.scored_tokens.tolist() == [list(pair.scored_tokens) for pair in pairs]

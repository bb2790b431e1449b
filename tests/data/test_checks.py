"""Length limits, what the report says of odd sets, and the preview for the eye."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastdpo.data import Pair, PairDataset, legend, prepare_pairs, rows_from, show_pairs
from fastdpo.data.checks import check_pairs
from fastdpo.data.pairs import IDENTICAL_AFTER_TRUNCATION, OVER_LONG_PROMPT
from fastdpo.data.truncation import truncate
from fastdpo.options import TokenizationOptions
from tests.data.test_tokenize import chat, ids_of, prepare, strings, tokenization


@pytest.fixture
def gpt2(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers/gpt2")


@pytest.fixture
def chatml(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers/minimind_chatml")


# Limits of the parts

some = st.integers(1, 12).map(lambda n: list(range(100, 100 + n)))
limit = st.one_of(st.none(), st.integers(1, 14))


@settings(max_examples=300, deadline=None)
@given(st.booleans(), some, some, some, limit, limit)
def test_parts_are_cut_to_their_own_limits_first(bos, prompt, chosen, rejected, most, completion):
    prompt = [0] * bos + prompt
    parts = {"max_prompt_length": most, "max_completion_length": completion}
    limits = tokenization(max_length=None, **parts)
    cut = truncate(prompt, chosen, rejected, options=limits, bos_token_id=0)
    assert cut is not None
    expected = prompt
    if most is not None and len(prompt) > most:
        expected = [0] * bos + prompt[len(prompt) - most + bos :]
    assert cut == (expected, chosen[:completion], rejected[:completion])
    both = tokenization(max_length=9, **parts)
    then = tokenization(max_length=9)
    assert truncate(prompt, chosen, rejected, options=both, bos_token_id=0) == truncate(
        *cut, options=then, bos_token_id=0
    )


LONG = strings("one two three four five six seven", " a b c d", " e f")


def test_the_limits_reach_the_pairs_and_are_counted(gpt2):
    whole = ids_of(prepare(gpt2, LONG)[0])
    pairs = prepare(gpt2, LONG, max_prompt_length=3, max_completion_length=2)
    assert ids_of(pairs[0]) == (whole[0][-3:], whole[1][:2], whole[2][:2])
    assert pairs[0].cut == (True, True, True)
    report = pairs.report
    assert (report.truncated_prompts, report.truncated_completions) == (1, 2)
    assert "cut to length: 1 prompts, 2 completions" in report.describe()
    pairs = prepare(gpt2, LONG, max_completion_length=4)
    assert pairs[0].cut == (False, True, False)
    assert PairDataset.from_pairs(pairs)[0].cut == (False, True, False)
    assert prepare(gpt2, LONG)[0].cut == (False, False, False)


def test_max_prompt_length_saves_rows_whose_prompt_is_over_long(gpt2):
    short = strings("a", " b", " c")
    start = {"max_length": 7, "truncation_mode": "keep_start"}
    lost = prepare(gpt2, LONG, short, **start)
    assert lost.report.dropped[OVER_LONG_PROMPT].count == 1
    for options in (start | {"max_prompt_length": 3}, {"max_length": 7}):
        saved = prepare(gpt2, LONG, short, **options)
        assert not saved.report.dropped
        assert saved[0].cut[0]


def test_completions_that_a_limit_makes_equal_are_dropped(gpt2):
    row = strings("a", " b c d", " b c e")
    pairs = prepare(gpt2, row, strings("a", " b", " c"), max_completion_length=2)
    assert pairs.report.dropped[IDENTICAL_AFTER_TRUNCATION].count == 1


# What is odd


def test_copies_are_counted_and_the_most_frequent_is_named(gpt2):
    rows = [strings("a", " b", " c"), strings("d", " e", " f")]
    pairs = prepare(gpt2, *rows, rows[1], rows[0], rows[1], strings("a", " b", " c x"))
    assert len(pairs) == 6
    assert (
        "warning: 3 pairs are copies of earlier ones (that of row 1 is there 3 times)"
        in pairs.report.describe()
    )
    assert "copies" not in prepare(gpt2, *rows).report.describe()
    pairs = prepare(gpt2, *rows, rows[0])
    found = check_pairs(pairs, lambda row: f"{pairs.report.source}:{row + 1}")
    assert "(that of line 1 is there 2 times)" in found[0]
    # The same tokens divided otherwise are another pair.
    shifted = [Pair(*(pair_part(p) for p in parts), row=0) for parts in ((2, 1, 1), (1, 2, 1))]
    assert len({tuple(keys) for keys in PairDataset.from_pairs(shifted).keys.tolist()}) == 2


def pair_part(length):
    import numpy as np

    return np.ones(length, dtype=np.int32)


@pytest.mark.parametrize(
    ("longer", "pairs", "said"),
    [
        (0.9, 60, "warning: chosen is the longer completion in 90% of the pairs"),
        (0.1, 60, "warning: chosen is the shorter completion in 90% of the pairs"),
        (0.7, 60, None),
        (1.0, 20, None),
    ],
)
def test_a_length_bias_is_told_where_there_are_pairs_enough(gpt2, longer, pairs, said):
    rows = []
    for number in range(pairs):
        long, short = f" it is {number} words", f" {number}"
        sides = (long, short) if number < longer * pairs else (short, long)
        rows.append(strings("a", *sides))
    described = prepare(gpt2, *rows, progress=False).report.describe()
    assert (said in described) if said else ("warning" not in described)
    assert re.search(
        r"mean tokens: prompt 1, chosen \d, rejected \d; longest prompt with", described
    )


def test_many_over_long_rows_and_repeated_prompts_are_told(gpt2):
    good = strings("a", " b", " c")
    start = {"max_length": 7, "truncation_mode": "keep_start"}
    described = prepare(gpt2, *[good] * 9, LONG, **start).report.describe()
    assert "warning: 10% of the rows are lost to max_length" in described
    described = prepare(gpt2, *[good] * 30, LONG, **start).report.describe()
    assert "are lost to" not in described
    text = "Tell me about the sea."
    repeated = strings(text, f"{text} It is wet.", f"{text} No.")
    described = prepare(gpt2, repeated, strings(text, " It is wet.", " No.")).report.describe()
    assert "warning: in 1 rows both completions begin with the prompt once more" in described


def test_columns_that_the_template_does_not_look_at_are_told_once(chatml):
    rows = [chat("q", f"a {n}", "b", chat_template_kwargs={"colour": "red"}) for n in range(3)]
    described = prepare(chatml, *rows).report.describe()
    assert described.count("the chat template does not use 'colour'") == 1
    chatml.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    tools = [chat("q", "a", "b", tools=[{"name": "f"}])]
    assert "does not use 'tools'" in prepare(chatml, *tools).report.describe()


# The preview


def test_a_preview_shows_parts_cuts_and_where_the_completions_part(gpt2):
    rows = [strings("Say it:", " one two three", " one two four"), LONG, strings("a", " b", " c")]
    pairs = prepare_pairs(rows_from(rows, "rows"), gpt2, TokenizationOptions(max_prompt_length=3))
    assert show_pairs(pairs, gpt2, n=2) == (
        "pair 1 of 3 (row 0)\n"
        "  prompt, 3 tokens:\n"
        "    Say it:\n"
        "  chosen, 4 tokens:\n"
        "     one two|| three<|endoftext|>\n"
        "  rejected, 4 tokens:\n"
        "     one two|| four<|endoftext|>\n"
        "\n"
        "pair 3 of 3 (row 2)\n"
        "  prompt, 1 tokens:\n"
        "    a\n"
        "  chosen, 2 tokens:\n"
        "     b<|endoftext|>\n"
        "  rejected, 2 tokens:\n"
        "     c<|endoftext|>"
    )
    assert "[cut]  five six seven" in show_pairs(pairs, gpt2, n=9)
    cut = prepare_pairs(rows_from(rows, "rows"), gpt2, TokenizationOptions(max_completion_length=2))
    assert show_pairs(cut, gpt2).count(" [cut]\n") == 2


def test_colours_where_a_terminal_wants_them_and_no_other_escape(gpt2, monkeypatch):
    pairs = prepare(gpt2, strings("a\x1b[2Jb", " c\u202e", " d\rx"))
    plain = show_pairs(pairs, gpt2, color=False)
    assert "\x1b" not in plain
    assert "a\\u001b[2Jb" in plain
    assert "\\u202e" in plain
    assert "\\u000dx" in plain
    painted = show_pairs(pairs, gpt2, color=True)
    assert "\x1b[36ma\\u001b[2Jb\x1b[0m" in painted
    assert re.sub("\x1b\\[[0-9;]*m", "", painted) == plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert show_pairs(pairs, gpt2) == painted
    monkeypatch.setenv("NO_COLOR", "1")
    assert show_pairs(pairs, gpt2) == plain


def test_the_legend_names_parts_and_marks_in_their_colors(monkeypatch):
    plain = legend(color=False)
    for mark in ("prompt, chosen, rejected", "||", "what both begin with", "[cut]"):
        assert mark in plain
    painted = legend(color=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", painted) == plain
    for code, name in (("36", "prompt"), ("32", "chosen"), ("31", "rejected"), ("7", "[cut]")):
        assert f"\x1b[{code}m{name}\x1b[0m" in painted
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert legend() == plain


def test_long_texts_lose_their_middle(gpt2):
    pairs = prepare(gpt2, strings("word " * 2000, " a", " b"), max_length=None)
    shown = show_pairs(pairs, gpt2)
    assert "[... 9,200 letters ...]" in shown
    assert len(shown) < 1200

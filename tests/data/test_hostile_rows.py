"""Rows, templates and tokenizers that would take the renderer over, or never end."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdpo.data import DataError, prepare_pairs, rows_from
from fastdpo.data.chat_template import PLAIN_CHAT_TEMPLATE
from fastdpo.data.tokenizer_bounds import check_growth
from tests.tiny_trainer import byte_tokenizer

PLAIN = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
THINKING = "{% if think is defined and think %}Hm.{% endif %}" + PLAIN


def row(**more):
    def turns(role, text):
        return [{"role": role, "content": text}]

    sides = {"chosen": turns("assistant", "yes"), "rejected": turns("assistant", "no")}
    return {"prompt": turns("user", "Well?")} | sides | more


def prepare(template, **more):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return prepare_pairs(rows_from([row(**more)], "rows"), tokenizer), tokenizer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", "{{ 'another' }}"), ("tokenize", True), ("return_dict", True),
        ("return_tensors", "pt"), ("add_generation_prompt", False), ("tools", []),
        ("continue_final_message", True), ("max_length", 1), ("truncation", True),
        ("padding", True), ("messages", []), ("conversation", []), ("tokenizer_kwargs", {}),
        ("return_assistant_tokens_mask", True), ("eos_token", "x"), ("bos_token", "x"),
        ("raise_exception", "x"), ("strftime_now", "x"),
    ],
)  # fmt: skip
def test_a_row_sets_nothing_of_the_renderer(name, value):
    with pytest.raises(
        DataError, match=rf"rows row 0: chat_template_kwargs sets '{name}'.*\(think"
    ):
        prepare(THINKING, chat_template_kwargs={name: value})


def test_a_row_sets_the_variables_of_its_template():
    plain, tokenizer = prepare(THINKING)
    thought, _ = prepare(THINKING, chat_template_kwargs={"think": True})
    assert tokenizer.decode(thought[0].prompt_ids).startswith("Hm.")
    assert not tokenizer.decode(plain[0].prompt_ids).startswith("Hm.")


def test_a_name_that_the_template_does_not_read_is_noted_and_left_out():
    pairs, _ = prepare(PLAIN, chat_template_kwargs={"mood": "good", "documents": []})
    said = pairs.report.describe()
    assert "does not use 'mood'" in said
    assert "does not use 'documents'" in said


def test_blocks_of_transformers_hide_no_variable():
    template = "{% generation %}{{ tone }}{% endgeneration %}" + PLAIN
    pairs, tokenizer = prepare(template, chat_template_kwargs={"tone": "Oh."})
    assert tokenizer.decode(pairs[0].prompt_ids).startswith("Oh.")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}",
        "{{ 'a' * 10**12 }}",
        "{{ '%999999999999d' | format(3) }}",
        "{% set l = [[]] * 10**11 %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_template_that_runs_or_grows_for_ever_is_stopped(template, monkeypatch):
    monkeypatch.setattr("fastdpo.data.rendering.MOST_SECONDS", 0.3)
    monkeypatch.setattr("fastdpo.data.rendering.MOST_BYTES", 2**28)
    with pytest.raises(DataError, match=r"rows row 0: the chat template (takes more|refuses)"):
        prepare(template)


def test_a_template_that_makes_too_long_a_text_is_refused(monkeypatch):
    monkeypatch.setattr("fastdpo.data.rendering.MOST_LETTERS", 1000)
    with pytest.raises(DataError, match=r"a text of 1,0.. letters of this row, more than 1,000"):
        prepare("{{ 'a' * 1000 }}" + PLAIN)


def test_a_template_that_is_none_says_so():
    with pytest.raises(DataError, match="rows row 0: the chat template refuses"):
        prepare("{% if %}", chat_template_kwargs={"think": True})


def tokenizer_with(**stages):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "?": 2}, merges=[], unk_token="?"))
    for name, stage in stages.items():
        setattr(tokenizer, name, stage)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="?")


@pytest.mark.parametrize(
    "stages",
    [
        {"normalizer": normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)},
        {"normalizer": normalizers.Sequence([normalizers.Replace(Regex("a|b"), "aa")] * 40)},
        {"normalizer": normalizers.Sequence(
            [normalizers.Sequence([normalizers.Replace("a", "a" * 40)])] * 2)},
        {"normalizer": normalizers.Replace(Regex(""), "a" * 2000)},
        {"decoder": decoders.Sequence([decoders.Replace("a", "aa")] * 40)},
    ],
)  # fmt: skip
def test_a_tokenizer_that_doubles_for_ever_is_refused(stages):
    (part,) = stages
    with pytest.raises(DataError, match=rf"the {part} of the tokenizer .* times longer"):
        prepare_pairs(
            rows_from([{"prompt": "a", "chosen": "b", "rejected": "a"}], "rows"),
            tokenizer_with(**stages),
        )


def test_usual_replacements_are_let_be():
    check_growth(
        tokenizer_with(
            normalizer=normalizers.Sequence(
                [normalizers.NFKC(), normalizers.Replace(" ", "\u2581")]
                + [normalizers.Replace(Regex(" {2,}"), " ")] * 3
            )
        )
    )  # fmt: skip
    check_growth(byte_tokenizer())


def test_a_pattern_that_gives_up_is_one_sentence():
    pattern = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = tokenizer_with(pre_tokenizer=pattern)
    rows = [{"prompt": "a", "chosen": "a" * 50 + "bb", "rejected": "a"}]
    with pytest.raises(DataError, match=r"the tokenizer's own code gives up .*retry-limit"):
        prepare_pairs(rows_from(rows, "rows"), tokenizer)


def test_the_plain_template_reads_nothing_that_a_row_could_set():
    with pytest.raises(DataError, match=r"sets 'tokenize'.*\(none\)"):
        prepare(PLAIN_CHAT_TEMPLATE, chat_template_kwargs={"tokenize": True})

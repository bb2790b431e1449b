"""Chat templates that write the date: the same one for a whole run, as strftime would write it."""

from datetime import datetime

import pytest

from fastdpo.data import prepare_pairs, rows_from
from fastdpo.data.template_date import asks_for_date, with_date
from fastdpo.options import TokenizationOptions
from tests.tiny_trainer import TOKENIZER, byte_tokenizer

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
LLAMA = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    '    {%- else %}\n        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n'
    '{%- endif %}\n{{- "Today Date: " + date_string + "\\n" }}' + TURNS
)
"""As Llama 3.2's template begins."""

MACRO = "{%- macro head() %}Today: {{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}" + TURNS
BUILT = "{% set form = '%A ' ~ '%-d %%' %}{{ strftime_now(form) | upper }}" + TURNS
CONVERSATION = [{"role": "user", "content": "hi"}]
ROW = {
    "prompt": CONVERSATION,
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def rendered(template, day):
    return TOKENIZER.apply_chat_template(
        CONVERSATION, chat_template=with_date(template, day), tokenize=False
    )


@pytest.mark.parametrize("template", [LLAMA, MACRO, BUILT], ids=["llama", "in a macro", "built"])
def test_a_day_is_written_as_the_clock_would_write_it(template):
    with_clock = TOKENIZER.apply_chat_template(CONVERSATION, chat_template=template, tokenize=False)
    assert with_clock == rendered(template, datetime.now().date().isoformat())
    assert rendered(template, "2025-07-01") != rendered(template, "2025-07-02")


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%A, %B %-d, %Y at %H:%M", "%%d %j %U", "no day", "", "%Q %5Y", "%"]
)
def test_every_format(form):
    for template in (f"{{{{ strftime_now('{form}') }}}}", f"{{% set f = '{form}' %}}"):
        if "set" in template:
            template += "{{ strftime_now(f) }}"
        found = rendered(template, "2024-12-31")
        if form not in ("%Q %5Y", "%"):  # the C library's own business
            assert found == datetime(2024, 12, 31).strftime(form)


@pytest.mark.parametrize(
    "text", ["\n  a\n", "{% set x = 1 %}\n{{ x }}", "  {%- set x = 1 %} b", ""]
)
def test_what_stands_in_the_template_stays(text):
    plain = TOKENIZER.apply_chat_template(CONVERSATION, chat_template=text + "|", tokenize=False)
    assert rendered(text + "|", "2025-07-01") == plain


def test_only_templates_that_ask_are_dated():
    assert asks_for_date(LLAMA)
    assert not asks_for_date(TURNS)
    assert not asks_for_date("{{ strftime_now_and_then }}")


def prepared(template, day=None, **row):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    options = TokenizationOptions(template_date=day)
    return prepare_pairs(rows_from([{**ROW, **row}], "rows"), tokenizer, options)


@pytest.mark.parametrize(
    "template",
    [LLAMA, {"default": TURNS.replace("role", "content"), "tool_use": LLAMA}],
    ids=["one", "named"],
)
def test_pairs_have_the_day_of_the_option_and_say_so(template):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {"tools": tools} if isinstance(template, dict) else {}
    pairs = prepared(template, "2025-07-01", **row)
    text = TOKENIZER.decode(pairs[0].prompt_ids)
    assert "Today Date: 01 Jul 2025" in text
    assert pairs.report.template_date == "2025-07-01"
    assert "every row gets 2025-07-01 (--template_date)" in pairs.report.describe()
    assert (
        pairs[0].prompt_ids.tolist()
        != prepared(template, "2025-07-02", **row)[0].prompt_ids.tolist()
    )
    today = prepared(template, **row)
    assert today.report.template_date == datetime.now().date().isoformat()


def test_pairs_of_other_templates_and_rows_have_no_day():
    assert prepared(TURNS, "2025-07-01").report.template_date is None
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LLAMA
    strings = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = prepare_pairs(rows_from([strings], "rows"), tokenizer)
    assert pairs.report.template_date is None


@pytest.mark.parametrize(
    "day", ["1 July 2025", "2025-02-30", "20250701", "", "2025-07-01T10:00", 5]
)
def test_what_is_no_day_is_refused(day):
    with pytest.raises(ValueError, match=r"--template_date is .* must be a day as 2025-06-30"):
        TokenizationOptions(template_date=day)

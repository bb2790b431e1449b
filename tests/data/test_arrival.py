"""Whatever a row says arrives in the text of the template, in one form, or is refused by name."""

import json

import pytest
from transformers import AutoTokenizer

from fastdpo.data import DataError, prepare_pairs, rows_from
from fastdpo.data.chat_template import PLAIN_CHAT_TEMPLATE
from fastdpo.data.normalize import preference_row
from fastdpo.data.tools import result_text, tools_of
from tests.data.test_tokenize import ids_of

TEMPLATES = ("qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training", "minimind", "phi3")
SHOWS_TOOLS = TEMPLATES[:-1]


def turn(role, content, **more):
    return {"role": role, "content": content} | more


def call(arguments, name="weather"):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return turn("assistant", "", tool_calls=calls)


def tool(name="weather", **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


Q, GOOD, BAD = (
    turn("user", "Which colour is it?"),
    turn("assistant", "Blue."),
    turn("assistant", "No"),
)
CITY = {"city": {"type": "string"}}


@pytest.fixture(scope="module")
def tokenizers(shared_data):
    made = {}
    for name in TEMPLATES:
        made[name] = AutoTokenizer.from_pretrained(shared_data / "tokenizers/minimind_chatml")
        if name != "minimind":
            template = shared_data / f"templates/{name}.jinja"
            made[name].chat_template = template.read_text()
    return made


def with_template(shared_data, template):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/minimind_chatml")
    tokenizer.chat_template = template
    return tokenizer


def texts(tokenizer, *rows):
    pairs = prepare_pairs(rows_from(list(rows), "rows"), tokenizer, progress=False)
    assert len(pairs) == len(rows)
    return [tuple(tokenizer.decode(ids) for ids in ids_of(pair)) for pair in pairs]


def row(prompt=(Q,), chosen=(GOOD,), rejected=(BAD,), **more):
    return {"prompt": [*prompt], "chosen": [*chosen], "rejected": [*rejected]} | more


# Roles

KNOWN = {
    "human": "user", "User": "user", "USER": "user", "prompter": "user",
    "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "developer": "system", "System": "system",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", KNOWN)
def test_a_role_by_another_name_is_the_one_that_the_template_knows(tokenizers, role, name):
    tokenizer, content = tokenizers[name], "Something said."
    meant = KNOWN[role]
    place = {"user": 2, "system": 0}.get(meant, 1)

    def said(spoken):
        turns = [Q, GOOD, turn("user", "And?")]
        return row([*turns[:place], turn(spoken, content), *turns[place:]])

    if meant == "tool" and name == "phi3":
        with pytest.raises(DataError, match="leaves out the turn of the role 'tool'"):
            texts(tokenizer, said(role))
        return
    ((prompt, *_),) = found = texts(tokenizer, said(role))
    assert content in prompt
    assert found == texts(tokenizer, said(meant))


def test_sharegpt_and_chat_roles_are_the_same_names():
    for role in ("human", "gpt", "observation", "function_response", "system"):
        turns = [{"from": role, "value": "x"}, turn(role, "x")]
        both = [preference_row(row([each, Q])) for each in turns]
        assert both[0] == both[1]
    called = {"name": "f", "arguments": {"a": 1}}
    turns = [{"from": "function_call", "value": json.dumps(called)},
             turn("function_call", json.dumps(called))]  # fmt: skip
    both = [preference_row(row([Q], [each])) for each in turns]
    assert both[0].chosen == both[1].chosen
    assert both[0].chosen[0]["tool_calls"][0]["function"] == called


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", ["critic", "narrator", "planner"])
def test_a_role_that_no_template_knows_is_refused_even_if_its_words_stand_elsewhere(
    tokenizers, role, name
):
    for content in ("Unheard of.", "colour", "e"):
        with pytest.raises(DataError, match=f"rows row 0: .*leaves out the turn.*'{role}'"):
            texts(tokenizers[name], row([turn(role, content), Q]))
        with pytest.raises(DataError, match=f"rows row 0: .*leaves out the turn.*'{role}'"):
            texts(tokenizers[name], row([Q, GOOD, Q], [turn(role, content)], [GOOD]))


def test_a_template_that_names_the_developer_gets_it_and_one_that_prints_any_role_too(shared_data):
    knows = "{% for m in messages %}{% if m.role in ['developer', 'user', 'assistant'] %}" \
            "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"  # fmt: skip
    ((prompt, *_),) = texts(with_template(shared_data, knows), row([turn("developer", "Hm."), Q]))
    assert prompt.startswith("<developer>Hm.")
    prints = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    ((prompt, *_),) = texts(with_template(shared_data, prints), row([turn("critic", "Hm."), Q]))
    assert prompt.startswith("<critic>Hm.")


def test_a_second_system_turn_that_the_template_drops_is_refused(shared_data):
    first = "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.role }}: " \
            "{{ m.content }}\n{% endif %}{% endfor %}"  # fmt: skip
    tokenizer = with_template(shared_data, first)
    assert texts(tokenizer, row([turn("system", "Be kind."), Q]))
    with pytest.raises(DataError, match=r"'system'.*turn 2: 'Be brief.'"):
        texts(tokenizer, row([turn("system", "Be kind."), turn("system", "Be brief."), Q]))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content | replace('\n', ' ') }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}",
        PLAIN_CHAT_TEMPLATE,
    ],
)
def test_contents_that_a_template_trims_quotes_or_unthinks_have_arrived(shared_data, template):
    tokenizer = with_template(shared_data, template)
    thought = turn("assistant", '<think>\nHm.\n</think>\n\nIt is "so".')
    assert texts(tokenizer, row([turn("user", ' two\nlines "é" \n'), thought, Q]))


# Parts


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_in_text_parts_is_its_text(tokenizers, name):
    parts = [{"type": "text", "text": "Which colour"}, {"type": "text", "text": " is it?"}]
    parts[0]["image"] = None
    as_parts = row([turn("user", parts)], [turn("assistant", [{"type": "text", "text": "Blue."}])])
    assert texts(tokenizers[name], as_parts) == texts(tokenizers[name], row())


def test_a_template_that_wants_parts_gets_them(shared_data):
    wants = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %};{% endfor %}"
    )
    ((prompt, chosen, _),) = texts(with_template(shared_data, wants), row())
    assert prompt + chosen == "user: Which colour is it?;assistant: Blue.;"


# Tools


@pytest.mark.parametrize("name", SHOWS_TOOLS)
def test_tools_calls_and_results_in_every_dress_give_the_same_ids(tokenizers, name):
    arguments, result = {"city": "Oslo", "days": 2}, {"rain": True, "mm": 3.5}
    tools = [tool(**CITY), tool("time")]
    plain = row(
        [Q, call(arguments), turn("tool", json.dumps(result)), Q],
        [call(arguments)], [call({"city": "Rome"})], tools=tools,
    )  # fmt: skip
    expected = texts(tokenizers[name], plain)
    assert '"arguments": {"city": "Oslo", "days": 2}' in expected[0][1]
    assert '"name": "time"' in expected[0][0]
    quoted = json.dumps(arguments)
    calls = json.dumps(call(arguments)["tool_calls"])
    older = {"name": "weather", "arguments": quoted}
    with_nulls = [Q, call(arguments | {"x": None}), turn("tool", result | {"y": None}), Q]
    dressed = [
        plain | {"tools": [json.dumps(each) for each in tools]},
        plain | {"tools": json.dumps(tools)},
        plain | {"tools": [tools[0], json.dumps(tools[1])]},
        plain | {"chosen": [call(quoted)]},
        plain | {"chosen": [turn("assistant", "", tool_calls=calls)]},
        plain | {"chosen": [turn("assistant", "", function_call=older)]},
        plain | {"prompt": [Q, call(quoted), turn("tool", result), Q]},
        plain | {"prompt": [Q, call(quoted), turn("function", result, name="weather"), Q]},
        plain | {"prompt": with_nulls},
    ]
    for other in dressed:
        assert texts(tokenizers[name], other) == expected


def test_what_is_no_tool_call_or_result_is_explained():
    assert tools_of('""') is None
    assert tools_of("[]") is None
    assert tools_of(json.dumps(tool())) == [tool()]
    quoted = {"name": "f", "parameters": '{"type": "object"}'}
    assert tools_of([quoted]) == [{"name": "f", "parameters": {"type": "object"}}]
    assert result_text([{"a": 1}]) == '[{"a": 1}]'
    assert result_text(3) == "3"
    assert result_text([{"type": "text", "text": "x"}]) == [{"type": "text", "text": "x"}]
    for change, reason in (
        ({"chosen": [call("f(1)")]}, r"chosen\[0\]\.tool_calls\[0\] has 'arguments'.*not JSON"),
        ({"chosen": [turn("assistant", "", tool_calls=3)]}, r"tool_calls is a number \(3\)"),
        ({"chosen": [turn("assistant", "", tool_calls=[3])]}, r"tool_calls\[0\] is a number"),
        ({"chosen": [turn("assistant", "", tool_calls=[{"function": "f"}])]}, "has no name of a"),
        ({"chosen": [turn("assistant", "", function_call=3)]}, "has no name of a function"),
        ({"tools": ["{"]}, r"tools\[0\] is a string that is not JSON"),
        ({"tools": [3]}, r"tools\[0\] is a number"),
        ({"tools": [{"name": "f", "parameters": "{"}]}, r"tools\[0\]\.parameters"),
    ):
        with pytest.raises(DataError, match=reason):
            preference_row(row() | change)


def test_a_template_that_cannot_show_tools_says_so(shared_data, tokenizers):
    described = prepare_pairs(rows_from([row(tools=[tool()])], "rows"), tokenizers["phi3"]).report
    assert "the chat template does not use 'tools'" in described.describe()
    plain = with_template(shared_data, PLAIN_CHAT_TEMPLATE)
    for tokenizer in (tokenizers["phi3"], plain):
        with pytest.raises(DataError, match=r"leaves out.*'assistant' and its tool calls.*weather"):
            texts(tokenizer, row([Q], [call({"city": "Oslo"})], [GOOD]))
    with pytest.raises(DataError, match="leaves out the turn of the role 'tool'"):
        texts(tokenizers["phi3"], row([Q, GOOD, turn("tool", {"rain": 1}), Q]))


def test_thoughts_beside_the_content_are_noted_where_the_template_has_no_use_for_them(tokenizers):
    rows = [row([Q], [GOOD | {"reasoning_content": "Hm."}])]
    for name, said in (("qwen2_5", True), ("qwen3", False)):
        notes = prepare_pairs(rows_from(rows, "rows"), tokenizers[name]).report.notes
        assert ["does not use 'reasoning_content'" in " ".join(notes)] == [said]


def test_arguments_are_text_for_a_template_that_writes_them_as_they_are(shared_data):
    writes = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
        "[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}\n{% endfor %}"
    )
    joins = writes.replace("{{ c.function.arguments }}", "{{ 'with ' + c.function.arguments }}")
    for template in (writes, joins):
        tokenizer = with_template(shared_data, template)
        for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}'):
            ((_, chosen, _),) = texts(tokenizer, row([Q], [call(arguments)], [call({})]))
            assert '{"city": "Oslo"}]' in chosen


# Readers


def test_every_reader_gives_the_same_ids(tmp_path, tokenizers):
    from datasets import Dataset

    rows = [
        row([Q], [call({"city": "Oslo"})], [call({"city": "Rome"})], tools=[tool(**CITY)],
            chat_template_kwargs=None),  # datasets takes its columns from the first row
        row([Q], [call({"a": 2, "b": [1, 2]}, "sum")], [call({"a": 3, "b": []}, "sum")],
            tools=[tool("sum", a={"type": "number"}, b={"type": "array"}), tool("none")]),
        row([turn("system", "Be kind."), Q, call({"city": "Oslo"}), turn("tool", "rain"), Q],
            tools=[tool(**CITY)], chat_template_kwargs={"enable_thinking": False}),
        row(chat_template_kwargs={"x": {"y": 1}}),
    ]  # fmt: skip
    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    from fastdpo.data import read_rows

    sources = {
        "list": rows_from(rows, "list"),
        "Dataset": rows_from(table, "Dataset"),
        "stream": rows_from(table.to_iterable_dataset(), "stream"),
        "pandas": rows_from(table.to_pandas(), "pandas"),
        "arrow": rows_from(table.data.table, "arrow"),
        "columns": rows_from(table.to_dict(), "columns"),
        "transformed": rows_from(table.with_transform(lambda batch: batch), "transformed"),
        "jsonl": read_rows(str(tmp_path / "rows.jsonl")),
        "json": read_rows(str(tmp_path / "rows.json")),
        "parquet": read_rows(str(tmp_path / "rows.parquet")),
        "saved": read_rows(str(tmp_path / "saved")),
    }
    for name in SHOWS_TOOLS:
        ids = {
            source: [ids_of(pair) for pair in prepare_pairs(read, tokenizers[name], progress=False)]
            for source, read in sources.items()
        }
        assert len(ids["list"]) == len(rows)
        for source, found in ids.items():
            assert found == ids["list"], source

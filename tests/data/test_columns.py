import json

import pytest

from fastdpo.data import DataError, prepare_pairs, read_rows, rows_from
from fastdpo.data.columns import SchemaReader
from fastdpo.options.data import column_roles


def turn(role, text):
    return {"role": role, "content": text}


USER, GOOD, BAD = turn("user", "q"), turn("assistant", "good"), turn("assistant", "bad")
SYSTEM = turn("system", "Be kind.")
CHAT = ([USER], [GOOD], [BAD])
WITH_SYSTEM = ([SYSTEM, USER], [GOOD], [BAD])
TEXTS = ("q", "good", "bad")
SIDES = {"chosen": "good", "rejected": "bad"}
HUMAN = {"from": "human", "value": "q"}
GPT = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}

# name: row, (prompt, chosen, rejected), what the verdict says
SHAPES = {
    "standard": ({"prompt": "q", **SIDES}, TEXTS, "standard, rendered as ready-made text"),
    "standard, implicit": (
        {"chosen": "q good", "rejected": "q bad"},
        ("q", " good", " bad"),
        "standard with an implicit prompt",
    ),
    "conversational": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        CHAT,
        "conversational, rendered by the chat template, from the columns prompt, chosen, rejected",
    ),
    "conversational, implicit": (
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        CHAT,
        "conversational with an implicit prompt",
    ),
    "one message each": ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, CHAT, "conversational"),
    "UltraFeedback": (
        {
            "prompt": "q",
            "prompt_id": "17",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, turn("assistant", "another")],
            "score_chosen": 8.0,
        },
        CHAT,
        "UltraFeedback), rendered by the chat template, from the columns prompt, chosen, rejected; "
        "not read: prompt_id, messages, score_chosen",
    ),
    "argilla, mixed": (
        {
            "dataset": "d",
            "chosen": [USER, GOOD | {"rating": 5}],
            "rejected": [USER, BAD | {"rating": 1}],
        },
        ([USER], [GOOD | {"rating": 5}], [BAD | {"rating": 1}]),
        "not read: dataset",
    ),
    "argilla, instruction": (
        {
            "instruction": "q",
            "chosen_response": "good",
            "rejected_response": "bad",
            "chosen_avg_rating": 5.0,
        },
        CHAT,
        "question and answers, rendered by the chat template, from the columns instruction as "
        "question, chosen_response as chosen, rejected_response as rejected",
    ),
    "distilabel orca": (
        {"system": "Be kind.", "input": "q", **SIDES, "generations": ["good", "bad"]},
        WITH_SYSTEM,
        "input as question",
    ),
    "orca": ({"system": "Be kind.", "question": "q", **SIDES}, WITH_SYSTEM, "question and answers"),
    "orca without a system": ({"system": "", "question": "q", **SIDES}, CHAT, "question"),
    "jondurbin": (
        {"id": "1", "source": "s", "system": "Be kind.", "prompt": "q", **SIDES},
        WITH_SYSTEM,
        "conversational",
    ),
    "system beside conversations": (
        {"system": "Be kind.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        WITH_SYSTEM,
        "implicit prompt",
    ),
    "a system turn is not doubled": (
        {"system": "Other.", "prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        WITH_SYSTEM,
        "conversational",
    ),
    "ShareGPT ranking": (
        {"conversations": [HUMAN], "chosen": GPT[0], "rejected": GPT[1]},
        CHAT,
        "ShareGPT ranking, rendered by the chat template, from the columns conversations, chosen",
    ),
    "ShareGPT with system, tools": (
        {
            "conversations": [HUMAN],
            "chosen": [GPT[0]],
            "rejected": [GPT[1]],
            "system": "Be kind.",
            "tools": "",
        },
        WITH_SYSTEM,
        "ShareGPT ranking",
    ),
    "messages and one answer each": (
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        CHAT,
        "messages as conversations",
    ),
    "Alpaca ranking": (
        {"instruction": "q", "input": "more", "output": "good", **SIDES},
        ([turn("user", "q\nmore")], [GOOD], [BAD]),
        "Alpaca ranking, rendered by the chat template, from the columns instruction as question, "
        "input, chosen, rejected; not read: output",
    ),
    "Alpaca with history": (
        {"instruction": "q", "input": "", "history": [["a", "b"]], "system": None, **SIDES},
        ([turn("user", "a"), turn("assistant", "b"), USER], [GOOD], [BAD]),
        "Alpaca ranking",
    ),
    "Alpaca, output list": (
        {"instruction": "q", "input": "", "output": ["good", "bad"]},
        CHAT,
        "Alpaca ranking",
    ),
    "preferred and dispreferred": (
        {"prompt": "q", "preferred": "good", "dispreferred": "bad"},
        TEXTS,
        "preferred as chosen",
    ),
    "TRL's names come first": (
        {"prompt": "q", **SIDES, "chosen_response": "x", "rejected_response": "y", "question": "z"},
        TEXTS,
        "not read: chosen_response, rejected_response, question",
    ),
    "messages beside whole conversations": (
        {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        CHAT,
        "conversational with an implicit prompt, rendered by the chat template, from the columns "
        "chosen, rejected; not read: messages",
    ),
    "tuples": (("q", "good", "bad"), TEXTS, "tuples of prompt, preferred, dispreferred"),
    "tuples of messages": ([[USER], [GOOD], [BAD]], CHAT, "tuples"),
    "transcripts": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: good one",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: great",
        },
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant:", " good one", " great"),
        "transcripts, prompt up to the last shared Assistant:",
    ),
    "transcripts that part early": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: good\n\nHuman: x\n\nAssistant: y",
            "rejected": "\n\nHuman: a\n\nAssistant: bad",
        },
        ("\n\nHuman: a\n\nAssistant:", " good\n\nHuman: x\n\nAssistant: y", " bad"),
        "transcripts",
    ),
    "rated completions": (
        {"instruction": "q", "completions": ["soso", "bad", "good"], "ratings": [3, 1, 5.5]},
        CHAT,
        "rated completions",
    ),
    "UltraFeedback, all completions": (
        {
            "instruction": "q",
            "models": ["a"],
            "completions": [
                {"response": "bad", "overall_score": 1.0, "rating": 9},
                {"response": "good", "overall_score": 7.5, "rating": 1},
                {"response": "unrated", "overall_score": None, "rating": 5},
            ],
        },
        CHAT,
        "rated completions",
    ),
    "Nectar": (
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [
                {"answer": "bad", "model": "m", "rank": 7.0},
                {"answer": "good", "model": "m", "rank": 1.0},
                {"answer": "soso", "model": "m", "rank": 2.0},
            ],
        },
        ("\n\nHuman: q\n\nAssistant: ", "good", "bad"),
        "answers as completions",
    ),
    "ranks": ({"prompt": "q", "responses": ["bad", "good"], "ranks": [2, 1]}, TEXTS, "ranks"),
}


def read_one(row, **options):
    reader = SchemaReader(row, **options)
    (found,) = reader.read(row)
    return reader, (found.prompt, found.chosen, found.rejected)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_recognised_and_comes_out_as_one_form(name):
    row, expected, said = SHAPES[name]
    before = json.dumps(row)
    reader, parts = read_one(row)
    assert parts == expected
    assert said in reader.describe()
    assert json.dumps(row) == before


def test_tools_and_template_variables_come_along():
    row = {"question": "q", **SIDES, "tools": '[{"name": "f"}]', "chat_template_kwargs": {"a": 1}}
    (found,) = SchemaReader(row).read(row)
    assert (found.tools, found.chat_template_kwargs) == ([{"name": "f"}], {"a": 1})


def test_sharegpt_roles_and_function_calls():
    row = {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            HUMAN,
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
        ],
        "chosen": GPT[0],
        "rejected": GPT[1],
    }
    _, (prompt, _, _) = read_one(row)
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "tool"]
    assert prompt[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    row["conversations"][2]["value"] = "f(1)"
    with pytest.raises(DataError, match=r"prompt\[2\] is a function_call whose value is not JSON"):
        read_one(row)


def test_columns_override_names_and_decide_between_text_and_turns():
    row = {"ask": "q", "yes": "good", "no": "bad", "prompt": "other"}
    roles = column_roles(["prompt=ask", "chosen=yes", "rejected=no"])
    reader, parts = read_one(row, columns=roles)
    assert parts == TEXTS
    assert "ask as prompt, yes as chosen, no as rejected" in reader.describe()
    assert read_one({"prompt": "q", **SIDES}, columns={"question": "prompt"})[1] == CHAT
    both = {"question": "q", "conversations": [HUMAN], **SIDES}
    assert read_one(both, columns={"question": "question"})[1] == CHAT
    assert read_one(both, columns={"conversations": "conversations"})[1] == CHAT
    with pytest.raises(DataError, match="names 'nowhere', and the row has 'prompt'"):
        read_one({"prompt": "q", **SIDES}, columns={"chosen": "nowhere"})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["prompt"], "write role=column"),
        (["prompt="], "write role=column"),
        (["promt=a"], "one of prompt, question"),
        (["prompt=a", "prompt=b"], "twice"),
        ({"prompt": "a", "chosen": "a"}, "twice"),
    ],
)
def test_wrong_words_for_columns(words, reason):
    with pytest.raises(ValueError, match=reason):
        column_roles(words)


UNKNOWN = {
    "nothing known": (
        {"a": 1, "b": 2},
        ["'a', 'b'", "recognised are: prompt, chosen", "--columns"],
    ),
    "texts": ({"text": "a"}, ["SFT"]),
    "messages alone": ({"messages": [USER, GOOD]}, ["SFT"]),
    "single completions": ({"prompt": "q", "completion": "a", "label": True}, ["KTO"]),
    "one side": ({"prompt": "q", "chosen": "a"}, ["'rejected' is missing", "--columns rejected="]),
    "two prompts": (
        {"question": "q", "instruction": "q", **SIDES},
        ["'question' and 'instruction' could both be the question", "--columns question=question"],
    ),
    "two histories": (
        {"question": "q", "conversations": [HUMAN], **SIDES},
        ["both 'question' and 'conversations'"],
    ),
    "two answers": (
        {"prompt": "q", "answers": ["a"], "responses": ["b"], "ratings": [1]},
        ["could both be the completions"],
    ),
    "a prompt by another name": (
        {"ask": "q", **SIDES},
        ["do not begin alike", "'ask', 'chosen', 'rejected'", "--columns prompt=ask"],
    ),
    "quoted messages": (
        {"chosen": str([USER, GOOD]), "rejected": str([USER, BAD])},
        ["'chosen' holds messages that were turned into text"],
    ),
    "an image": (
        {"images": ["x.png"], "prompt": "q", **SIDES},
        ["column 'images' holds images"],
    ),
    "no ratings": (
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
        ["nothing says which is the better"],
    ),
    "too few ratings": (
        {"prompt": "q", "completions": ["a", "b"], "ratings": [1]},
        ["a list of 2 numbers"],
    ),
    "ratings of words": (
        {"prompt": "q", "completions": ["a", "b"], "ratings": [1, "good"]},
        ["rating 1 is 'good'"],
    ),
    "truth for ratings": (
        {"prompt": "q", "completions": ["a", "b"], "ratings": [True, False]},
        ["rating 0 is True"],
    ),
    "completions without text": (
        {"prompt": "q", "completions": [{"x": "a", "score": 1}, {"x": "b", "score": 2}]},
        ["its text is expected under"],
    ),
    "three outputs": ({"instruction": "q", "output": ["a", "b", "c"]}, ["holds 3 completions"]),
    "a question of numbers": ({"question": 3, **SIDES}, ["column 'question' is 3"]),
    "a crooked history": (
        {"instruction": "q", "history": [["a"]], **SIDES},
        ["a list of [question, answer]"],
    ),
    "a system of numbers": ({"system": 3, "prompt": "q", **SIDES}, ["the system turn is 3"]),
    "a renamed column of numbers": (
        {"prompt": "q", "preferred": 1, "dispreferred": "b"},
        ["'chosen' is a number", "'preferred' is read as 'chosen'"],
    ),
    "a pair": (("a", "b"), ["a tuple (prompt, preferred, dispreferred)"]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_ambiguous_and_useless_shapes_are_explained(name):
    row, reasons = UNKNOWN[name]
    with pytest.raises(DataError) as caught:
        SchemaReader(row).read(row)
    for reason in reasons:
        assert reason in str(caught.value)


def test_all_pairs_of_rated_completions():
    row = {"prompt": "q", "completions": ["a", "b", "c", "d"], "ratings": [2, 1, 2, None]}
    found = [(p.chosen, p.rejected) for p in SchemaReader(row, rated_pairs="all").read(row)]
    assert found == [("a", "b"), ("c", "b")]
    assert [(p.chosen, p.rejected) for p in SchemaReader(row).read(row)] == [("a", "b")]
    for ratings in ([1, 1, 1, 1], [None] * 4):
        for mode in ("all", "best_worst"):
            assert not SchemaReader(row, rated_pairs=mode).read(row | {"ratings": ratings})


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"question": "q", **SIDES}, "of another shape: its columns are 'question'"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "the row is a conversation"),
        (dict(SIDES), "of another shape"),
        ({"prompt": "q", "chosen": "good"}, "'rejected' is missing"),
    ],
)
def test_a_row_of_another_shape_in_the_middle_is_named(tmp_path, other, reason):
    first = {"prompt": "q", **SIDES}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [first, first | {"more": 1}, other, first, other])))
    rows = read_rows(str(path))
    with pytest.raises(DataError) as caught:
        list(rows.preferences())
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("; 1 later rows are malformed too")


def test_optional_columns_may_come_and_go():
    reader = SchemaReader({"question": "q", **SIDES})
    for row, prompt in (
        ({"question": "q", **SIDES}, [USER]),
        ({"question": "q", "system": "Be kind.", **SIDES}, [SYSTEM, USER]),
        ({"question": "q", "input": "more", **SIDES}, [turn("user", "q\nmore")]),
        ({"question": "q", **SIDES}, [USER]),
    ):
        assert reader.read(row)[0].prompt == prompt


def test_the_verdict_is_in_the_report_and_ties_are_counted(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/gpt2")
    rows = [
        {"prompt": "q", "completions": [" a", " b", " c"], "ratings": [1, 2, 3]},
        {"prompt": "q", "completions": [" a", " b"], "ratings": [1, 1]},
    ]
    pairs = prepare_pairs(rows_from(rows, "mine", rated_pairs="all"), tokenizer)
    assert [pair.row for pair in pairs] == [0, 0, 0]
    described = pairs.report.describe().splitlines()
    assert described[0] == "mine: 2 rows read, 3 pairs kept"
    assert described[1].startswith("  read as rated completions, rendered as ready-made text")
    assert "dropped 1, no two completions that are rated differently: row 1" in described[2]


def test_raw_sharegpt_is_the_normalised_file_and_raw_alpaca_its_texts(shared_data):
    for language in ("en", "zh"):
        raw = read_rows(str(shared_data / f"prefs/raw/llamafactory_dpo_{language}_demo.json"))
        conv = read_rows(
            str(shared_data / f"prefs/norm/llamafactory_dpo_{language}_demo_conv.jsonl")
        )
        told: list[str] = []
        assert list(raw.preferences(told)) == list(conv.preferences())
        assert "ShareGPT ranking" in told[0]
    raw = read_rows(str(shared_data / "prefs/raw/rasbt_instruction-data-with-preference.json"))
    texts = read_rows(str(shared_data / "prefs/norm/rasbt_alpaca_pref.jsonl"))
    for (_, (turns,)), (_, (text,)) in zip(raw.preferences(), texts.preferences(), strict=True):
        assert [turns.chosen, turns.rejected] == [
            [turn("assistant", text.chosen)],
            [turn("assistant", text.rejected)],
        ]
        assert all(line in text.prompt for line in turns.prompt[0]["content"].split("\n"))


@pytest.mark.parametrize(
    "history", [1.5, 0, True, "yes", {"a": 1}, [1.5], ["ab"], [["a"]], [[1, 2]]]
)
def test_a_history_that_is_none_is_one_sentence(history):
    row = {"instruction": "a", "history": history, "output": ["x", "y"]}
    with pytest.raises(
        DataError, match=r"rows row 0: the history .* \[question, answer\] is needed"
    ):
        list(rows_from([row], "rows").preferences())


@pytest.mark.parametrize("history", [None, "", [], [["q", "a"]]])
def test_a_history_may_be_empty(history):
    row = {"instruction": "a", "history": history, "output": ["x", "y"]}
    ((_, [preference]),) = rows_from([row], "rows").preferences()
    assert len(preference.prompt) == (3 if history else 1)

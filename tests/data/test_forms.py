"""The forms of public preference sets: a row of each, how it is read, and what becomes of it.

`FORMS` has one entry or more for each form of the project's list (F1 to F23, vision refused by
name). `python -m tests.data.test_forms` prints the table of how each is read.
"""

import json
import sys

import pytest

from fastdpo.data import DataError, prepare_pairs, read_rows, rows_from
from fastdpo.data.columns import SchemaReader
from fastdpo.data.forms import FORMS as TABLE
from fastdpo.data.forms import NO_VERDICT, TIE
from fastdpo.data.ranked import RATED_ALIKE, RATED_ALONE
from fastdpo.options.data import column_roles


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
SKY, BLUE, RED = user("Sky?"), answer("Blue."), answer("Red.")
CHAT = ([SKY], [BLUE], [RED])
TEXTS = ("Sky?", "Blue.", "Red.")
WHOLE = {"chosen": [SKY, BLUE], "rejected": [SKY, RED]}
SIDES = {"chosen": "Blue.", "rejected": "Red."}
TWO = {"response_1": "Blue.", "response_2": "Red."}
LETTERS = {"response_a": "Blue.", "response_b": "Red."}
PARTS = {
    "a": [
        {"role": "user", "content": [{"type": "text", "text": "Sky?", "image": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Blue.", "image": None}]},
    ]
}

# name: row, (prompt, chosen, rejected), what the log says
FORMS = {
    "F1 UltraFeedback": (
        {"prompt": "Sky?", "prompt_id": "ab", **WHOLE, "messages": [SKY, BLUE]}
        | {"score_chosen": 9.0, "score_rejected": 2.0},
        CHAT,
        "a prompt beside conversations (UltraFeedback)",
    ),
    "F2 implicit prompt": (
        WHOLE | {"chosen_model": "a", "rejected_model": "b", "prompt_id": "1", "source": "x"},
        CHAT,
        "conversational with an implicit prompt",
    ),
    "F3 transcripts": (
        {f"{side}": f"\n\nHuman: Sky?\n\nAssistant: {text}" for side, text in SIDES.items()},
        ("\n\nHuman: Sky?\n\nAssistant:", " Blue.", " Red."),
        "transcripts",
    ),
    "F4 orca": ({"system": "", "question": "Sky?", **SIDES}, CHAT, "question and answers"),
    "F4 distilabel": (
        {"system": "", "input": "Sky?", **SIDES, "generations": ["Blue.", "Red."]}
        | {"order": ["chosen", "rejected"], "rating": [9, 2], "chosen_score": 9, "status": "x"},
        CHAT,
        "input as question",
    ),
    "F5 argilla": (
        {"source": "evol", "prompt": "Sky?", **WHOLE, "chosen-rating": 5.0, "chosen-model": "a"}
        | {"rejected-rating": 2.0, "rejected-model": "b"},
        CHAT,
        "UltraFeedback",
    ),
    "F5 argilla, older": (
        {"instruction": "Sky?", "chosen_response": "Blue.", "rejected_response": "Red."},
        CHAT,
        "chosen_response as chosen",
    ),
    "F6 raw UltraFeedback": (
        {
            "instruction": "Sky?",
            "completions": [
                {"response": "Red.", "overall_score": 3.0},
                {"response": "Blue.", "overall_score": 8.0, "annotations": {"x": {"Rating": "5"}}},
            ],
            "models": ["a", "b"],
            "correct_answers": ["Blue"],
        },
        CHAT,
        "rated completions",
    ),
    "F7 Tulu 3": ({"id": "1", "prompt": "Sky?", **WHOLE, "source": "x"}, CHAT, "UltraFeedback"),
    "F8 HelpSteer3": (
        {"domain": "general", "language": "english", "context": [SKY], "response1": "Blue."}
        | {"response2": "Red.", "overall_preference": -2, "individual_preference": []},
        CHAT,
        "two answers and a strength of preference, negative where the first is better (HelpSteer), "
        "rendered by the chat template, from the columns response1, response2, overall_preference, "
        "context as conversations; not read: domain, language, individual_preference",
    ),
    "F9 HelpSteer2 preference": (
        {"split": "train", "prompt": "Sky?", **TWO, "preference_strength": -2},
        TEXTS,
        "rendered as ready-made text, from the columns response_1, response_2, "
        "preference_strength, prompt",
    ),
    "F10 PKU-SafeRLHF": (
        {"prompt": "Sky?", "response_0": "Blue.", "response_1": "Red."}
        | {"better_response_id": 0, "safer_response_id": 1, "is_response_0_safe": True},
        TEXTS,
        "name of the better one",
    ),
    "F11 stack-exchange-paired": (
        {"qid": 1, "question": "Sky?", "response_j": "Blue.", "response_k": "Red."}
        | {"date": "x", "metadata": ["a"]},
        CHAT,
        "response_j as chosen, response_k as rejected",
    ),
    "F12 Code-Preference-Pairs": (
        {"instruction": "You write code", "input": "Sum a list", "accepted": "sum(x)"}
        | {"rejected": "max(x)", "ID": 1},
        ([user("You write code\nSum a list")], [answer("sum(x)")], [answer("max(x)")]),
        "accepted as chosen",
    ),
    "F13 arena": (
        {"model_a": "x", "model_b": "y", "winner": "model_a", "language": "en"}
        | {"conversation_a": [SKY, BLUE], "conversation_b": [SKY, RED]},
        CHAT,
        "name of the better one (PKU-SafeRLHF, arena)",
    ),
    "F13 arena, JSON text": (
        {"winner": "model_a", "conversation_a": json.dumps([SKY, BLUE])}
        | {"conversation_b": json.dumps([SKY, RED])},
        CHAT,
        "conversation_a, conversation_b, winner",
    ),
    "F13 arena, flags": (
        {"id": 1, "prompt": '["Sky?"]', "response_a": '["Blue."]', "response_b": '["Red."]'}
        | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        CHAT,
        "a flag at the better one",
    ),
    "F14 Nectar": (
        {
            "prompt": "\n\nHuman: Sky?\n\nAssistant: ",
            "answers": [{"answer": "Red.", "rank": 2.0}, {"answer": "Blue.", "rank": 1.0}],
            "source": ["x"],
            "num_responses": 2,
        },
        ("\n\nHuman: Sky?\n\nAssistant: ", "Blue.", "Red."),
        "answers as completions",
    ),
    "F15 SHP": (
        {"history": "Sky?", "human_ref_A": "Blue.", "human_ref_B": "Red.", "labels": 1}
        | {"score_A": 9, "score_B": 2, "score_ratio": 4.5},
        CHAT,
        "1 where the first is better (SHP)",
    ),
    "F16 summaries": (
        {"info": {"post": "p", "title": "t", "subreddit": "s"}, "choice": 0, "batch": "b"}
        | {"summaries": [{"text": "a"}, {"text": "b"}]},
        ("SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", " a", " b"),
        "two summaries",
    ),
    "F16 webgpt": (
        {"question": {"full_text": "Sky?", "id": "1"}, "answer_0": "Blue.", "answer_1": "Red."}
        | {"score_0": 1.0, "score_1": -1.0},
        CHAT,
        "two answers with a score each (WebGPT)",
    ),
    "F17 rejected_response": (
        {"messages": [SKY, BLUE], "rejected_response": "Red."},
        CHAT,
        "(ms-swift), rendered by the chat template, from the columns messages, rejected_response",
    ),
    "F17 rejected_messages": (
        {"messages": [SKY, BLUE], "rejected_messages": [SKY, RED]},
        CHAT,
        "(ms-swift)",
    ),
    "F17 query": (
        {"query": "Sky?", "response": "Blue.", "rejected_response": "Red.", "history": []},
        CHAT,
        "a response beside a rejected one (ms-swift)",
    ),
    "F18 OpenAI": (
        {"input": {"messages": [SKY], "tools": []}, "preferred_output": [BLUE]}
        | {"non_preferred_output": [RED]},
        CHAT,
        "(OpenAI)",
    ),
    "F19 NeMo-RL": (
        {
            "context": [SKY],
            "completions": [
                {"rank": 1, "completion": [RED]},
                {"rank": 0, "completion": [BLUE]},
            ],
        },
        CHAT,
        "rated completions, rendered by the chat template, from the columns context as "
        "conversations, completions",
    ),
    "F20 ShareGPT": (
        {"conversations": [{"from": "human", "value": "Sky?"}], "system": "", "tools": ""}
        | {side: {"from": "gpt", "value": text} for side, text in SIDES.items()},
        CHAT,
        "ShareGPT ranking",
    ),
    "F20 Alpaca": ({"instruction": "Sky?", "input": "", **SIDES}, CHAT, "Alpaca ranking"),
    "F21 Math-Step-DPO": (
        {"prompt": "1+1?", "initial_reason_steps": "Step 1: ", "chosen": "2", "rejected": "3"}
        | {"full_chosen": "Step 1: 2", "full_rejected": "Step 1: 3", "answer": "2"},
        ("1+1?Step 1: ", "2", "3"),
        "from the columns prompt, initial_reason_steps as answer_start, chosen, rejected",
    ),
    "F22 plain strings": ({"prompt": "Sky?", **SIDES}, TEXTS, "standard, rendered as ready-made"),
    "F22 with a system": ({"system": "Be kind.", "prompt": "Sky?", **SIDES},
                          ([SYSTEM, SKY], [BLUE], [RED]), "conversational"),
}  # fmt: skip

FURTHER = {
    "response_w": ({"prompt": "Sky?", "response_w": "Blue.", "response_l": "Red."}, TEXTS),
    "y_w": ({"prompt": "Sky?", "y_w": "Blue.", "y_l": "Red."}, TEXTS),
    "non_preferred": ({"prompt": "Sky?", "preferred": "Blue.", "non_preferred": "Red."}, TEXTS),
    "accepted_answer": (
        {"question": "Sky?", "accepted_answer": "Blue.", "rejected_answer": "Red."},
        CHAT,
    ),
    "response_A and winner B": (
        {"prompt": "Sky?", "response_A": "Red.", "response_B": "Blue.", "winner": "B"},
        TEXTS,
    ),
    "completion_a": ({"question": "Sky?", "completion_a": "Blue.", "completion_b": "Red."}
                     | {"preference": "completion_a"}, CHAT),
    "numbers from 1": ({"prompt": "Sky?", **TWO, "better_response_id": 1}, TEXTS),
    "a verdict of text, as in CSV": ({"prompt": "Sky?", **TWO, "preference_strength": "-1"}, TEXTS),
    "a label beside letters": ({"prompt": "Sky?", **LETTERS, "labels": 1}, TEXTS),
    "scores beside answers": ({"prompt": "Sky?", **LETTERS, "score_a": 3, "score_b": 1}, TEXTS),
    "arena of parts": (
        {"conversation_a": PARTS["a"], "conversation_b": [*PARTS["a"][:1], RED], "winner": "a"},
        ([user([{"type": "text", "text": "Sky?"}])],
         [answer([{"type": "text", "text": "Blue."}])], [RED]),
    ),
    "arena of two turns": (
        {"prompt": '["Sky?", "Sea?"]', "response_a": '["Red.", "No."]', "winner_model_a": 0}
        | {"response_b": '["Blue.", null]', "winner_model_b": 1},
        ([SKY], [BLUE, user("Sea?"), answer("")], [RED, user("Sea?"), answer("No.")]),
    ),
    "an article": (
        {"info": {"article": "p", "title": None}, "summaries": [" a", " b"], "choice": 1},
        ("ARTICLE: p\n\nTL;DR:", " b", " a"),
    ),
    "an object of lists": (
        {"info": {"post": "p"}, "summaries": {"text": ["a", "b"]}, "choice": 1},
        ("POST: p\n\nTL;DR:", " b", " a"),
    ),
    "rejected turns": ({"messages": [SKY, BLUE], "rejected_messages": [RED]}, CHAT),
    "one rejected in a list": ({"messages": [SKY, BLUE], "rejected_response": ["Red."]}, CHAT),
    "input of messages": (
        {"input": [SKY], "preferred_output": [BLUE], "non_preferred_output": [RED]}, CHAT,
    ),
    "input of text": (
        {"input": "Sky?", "preferred_output": "Blue.", "non_preferred_output": "Red."}, CHAT,
    ),
    "messages as JSON text": (
        {"chosen": json.dumps([SKY, BLUE]), "rejected": json.dumps([SKY, RED])}, CHAT,
    ),
    "messages as an object of lists": (
        {
            side: {"role": ["user", "assistant"], "content": ["Sky?", text]}
            for side, text in SIDES.items()
        },
        CHAT,
    ),
    "ranked objects of lists": (
        {"question": "Sky?", "completions": {"text": ["Red.", "Blue."], "score": [1, 2]}}, CHAT,
    ),
    "steps in a conversation": (
        {"question": "1+1?", "initial_reason_steps": "It is ", "chosen": "2", "rejected": "3"},
        ([user("1+1?")], [answer("It is 2")], [answer("It is 3")]),
    ),
}  # fmt: skip


def parts_of(preference):
    return preference.prompt, preference.chosen, preference.rejected


def read(row, **options):
    reader = SchemaReader(row, **options)
    (found,) = reader.read(row)
    return reader, parts_of(found)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_as_it_is_meant_and_named(name):
    row, expected, said = FORMS[name]
    before = json.dumps(row)
    reader, parts = read(row)
    assert parts == expected
    assert reader.describe().startswith("read as ")
    assert said in reader.describe()
    assert reader.describe().count("\n") == 0
    assert json.dumps(row) == before


@pytest.mark.parametrize("name", FURTHER)
def test_further_rows_of_the_same_kinds(name):
    row, expected = FURTHER[name]
    assert read(row)[1] == expected


def test_the_list_is_whole_and_every_entry_of_the_table_is_read():
    numbers = {int(name.split()[0][1:]) for name in FORMS}
    assert numbers == set(range(1, 23))
    rows = [row for row, *_ in (*FORMS.values(), *FURTHER.values())]
    assert {SchemaReader(row).name for row in rows} >= {form.name for form in TABLE}


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "question": "<image>Sky?", **SIDES},
        {"images": ["a.png"], "prompt": "<image>Sky?", **SIDES},
        {"images": [{"bytes": "x"}], **WHOLE},
        {
            "prompt": [user([{"type": "image"}, {"type": "text", "text": "x"}])],
            "chosen": [BLUE],
            "rejected": [RED],
            "images": ["a.png"],
        },
        {
            "prompt": [user([{"type": "image", "image": "a.png"}])],
            "chosen": [BLUE],
            "rejected": [RED],
        },
    ],
)  # fmt: skip
def test_f23_vision_is_refused_by_name(row):
    with pytest.raises(DataError, match="images"):
        SchemaReader(row).read(row)


# The sign rules

A, B, TIED = ("Blue.", "Red."), ("Red.", "Blue."), TIE
ASKED = {"prompt": "Sky?"}
SIGNS = [
    *((ASKED | {"response1": "Blue.", "response2": "Red.", "overall_preference": v}, side)
      for v, side in ((-3, A), (-1, A), (0, TIE), (1, B), (3, B), (None, NO_VERDICT))),
    *((ASKED | TWO | {"preference_strength": v}, side)
      for v, side in ((-1, A), (2, B), ("-2", A), ("0", TIE), (0.0, TIE), ("", NO_VERDICT))),
    *((ASKED | {"response_0": "Blue.", "response_1": "Red.", "better_response_id": v}, side)
      for v, side in ((0, A), (1, B), ("1", B), (1.0, B), (None, NO_VERDICT))),
    *((ASKED | TWO | {"better_response_id": v}, side) for v, side in ((1, A), (2, B))),
    *((ASKED | LETTERS | {"labels": v}, side)
      for v, side in ((1, A), (0, B), ("0", B), (None, NO_VERDICT))),
    *((ASKED | LETTERS | {"winner": v}, side)
      for v, side in (("model_a", A), ("model_b", B), ("A", A), ("b", B), ("response_b", B),
                      ("tie", TIE), ("both_bad", TIE), ("tie (bothbad)", TIE))),
    *((ASKED | LETTERS | {"winner_model_a": a, "winner_model_b": b, "winner_tie": 1 - a - b}, side)
      for a, b, side in ((1, 0, A), (0, 1, B), (0, 0, TIE), (True, False, A))),
    *((ASKED | {"answer_0": "Blue.", "answer_1": "Red.", "score_0": a, "score_1": b}, side)
      for a, b, side in ((1, -1, A), (0, 0.5, B), (0, 0, TIE), (None, 1, NO_VERDICT))),
    *(({"info": {"post": "p"}, "summaries": [" Blue.", " Red."], "choice": v},
       side if isinstance(side, str) else tuple(f" {text}" for text in side))
      for v, side in ((0, A), (1, B), (None, NO_VERDICT))),
    *((ASKED | {"completions": ["Blue.", "Red."], "ratings": v}, side)
      for v, side in (([2, 1], A), ([1, 2], B), (["1", "2"], B), ([1, 1], RATED_ALIKE))),
    *((ASKED | {"completions": ["Blue.", "Red."], "ranks": v}, side)
      for v, side in (([1, 2], A), ([2, 1], B))),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), SIGNS)
def test_a_verdict_is_read_in_both_directions_and_ties_have_their_reason(row, expected):
    found = SchemaReader(row).read(row)
    if isinstance(expected, str):
        assert list(found) == []
        assert found.reason == expected
    else:
        assert [(p.chosen, p.rejected) for p in found] == [expected]


def test_ties_are_dropped_and_counted_by_reason(shared_data):
    from transformers import AutoTokenizer

    verdicts = [0, -1, None, 2, 0]
    rows = [ASKED | TWO | {"preference_strength": verdict} for verdict in verdicts]
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/gpt2")
    report = prepare_pairs(rows_from(rows, "mine"), tokenizer).report
    assert {reason: entry.count for reason, entry in report.dropped.items()} == {
        TIE: 2,
        NO_VERDICT: 1,
    }
    assert (report.rows_read, report.pairs_kept) == (5, 2)
    assert report.shapes[0].startswith("read as two answers and a strength of preference")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ASKED | LETTERS | {"winner": "gpt-4"}, "names neither 'response_a' nor 'response_b'"),
        (ASKED | TWO | {"better_response_id": 0}, "names neither 'response_1' nor 'response_2'"),
        (ASKED | TWO | {"preference_strength": "much"}, "'preference_strength' is 'much'"),
        (ASKED | LETTERS | {"labels": 2}, "1, 0 or null is needed"),
        (ASKED | LETTERS | {"score_a": "x", "score_b": 1}, "column 'score_a' is 'x'"),
        (ASKED | TWO | {"response_3": "x", "better_response_id": 1}, "'chosen' is missing"),
        (ASKED | TWO, "'chosen' is missing"),
        ({"messages": [SKY], "rejected_response": "Red."}, "does not end with an assistant's"),
        ({"messages": [SKY, BLUE], "rejected_response": []}, "an empty list"),
        ({"info": {}, "summaries": ["a", "b"], "choice": 0}, "neither a 'post' nor an 'article'"),
        ({"info": {"post": "p"}, "summaries": ["a"], "choice": 0}, "a list of two summaries"),
        ({"info": {"post": "p"}, "summaries": ["a", "b"], "choice": 2}, "0, 1 or null"),
        ({"input": 3, "preferred_output": [BLUE], "non_preferred_output": [RED]}, "is 3, a string"),
    ],
)  # fmt: skip
def test_a_crooked_row_of_a_form_is_explained(row, reason):
    with pytest.raises(DataError, match=reason):
        SchemaReader(row).read(row)


def test_a_row_of_another_form_in_the_middle_is_named(tmp_path):
    rows = [ASKED | TWO | {"preference_strength": -1}, ASKED | TWO, ASKED | SIDES]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        DataError, match=r"jsonl:2: field 'preference_strength' is missing.*1 later"
    ):
        list(read_rows(str(path)).preferences())


def test_columns_that_the_user_names_come_before_a_form():
    row = ASKED | TWO | {"preference_strength": -1}
    roles = column_roles(["chosen=response_2", "rejected=response_1"])
    assert read(row, columns=roles)[1] == ("Sky?", "Red.", "Blue.")
    assert read(row, columns={"question": "prompt"})[1] == CHAT
    steps = FORMS["F21 Math-Step-DPO"][0]
    assert read(steps, columns={"question": "prompt"})[1] == (
        [user("1+1?")], [answer("Step 1: 2")], [answer("Step 1: 3")],
    )  # fmt: skip
    assert read(steps, columns={"answer_start": "none"})[1] == ("1+1?", "2", "3")


# Rated rows that follow each other


def rated(prompt, text, rating, **more):
    return {"prompt": prompt, "response": text, "helpfulness": rating, "coherence": 4} | more


def test_rated_rows_of_one_prompt_are_joined(shared_data):
    from transformers import AutoTokenizer

    rows = [
        rated("a", " x", 1), rated("a", " y", 4),
        rated("b", " x", 2), rated("b", " y", 2),
        rated("c", " alone", 3),
        rated("d", " x", None), rated("d", " y", 4), rated("d", " z", 1),
    ]  # fmt: skip
    read_as: list[str] = []
    found = list(rows_from(rows, "mine").preferences(read_as))
    assert [number for number, _ in found] == list(range(8))
    assert [[parts_of(p) for p in preferences] for _, preferences in found] == [
        [("a", " y", " x")], [], [], [], [], [("d", " y", " z")], [], [],
    ]  # fmt: skip
    reasons = [getattr(preferences, "reason", "") for _, preferences in found]
    assert reasons == ["", None, RATED_ALIKE, None, RATED_ALONE, "", None, None]
    assert "one after another (HelpSteer2), rendered as ready-made text" in read_as[0]
    assert "response as completions, helpfulness as ratings; not read: coherence" in read_as[0]
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/gpt2")
    report = prepare_pairs(rows_from(rows, "mine"), tokenizer).report
    assert (report.rows_read, report.pairs_kept) == (8, 2)
    assert {reason: each.count for reason, each in report.dropped.items()} == {
        RATED_ALIKE: 1, RATED_ALONE: 1,
    }  # fmt: skip
    named = rows_from(rows, "mine", columns={"ratings": "coherence"})
    assert not [p for _, preferences in named.preferences() for p in preferences]


def test_a_broken_rated_row_is_named_with_its_place():
    rows = [rated("a", " x", 1), rated("a", " y", "good")]
    with pytest.raises(DataError, match="mine row 1: column 'helpfulness' is 'good'"):
        list(rows_from(rows, "mine").preferences())
    with pytest.raises(DataError, match="mine row 1: field 'response' is missing"):
        list(rows_from([rows[0], {"prompt": "a", "helpfulness": 1}], "mine").preferences())


# Never an empty prompt by accident

RATED = {"completions": ["Blue.", "Red."], "ratings": [2, 1]}
LOST = {
    "rated, context of text": (RATED | {"context": "Sky?"}, ["'context'", "prompt=context"]),
    "rated, another name": (RATED | {"ask": "Sky?", "id": "x"}, ["prompt=ask", "question=ask"]),
    "rated, messages": (RATED | {"dialogue": [SKY]}, ["--columns conversations=dialogue"]),
    "ranked, messages": (
        {"talk": [SKY], "completions": [{"rank": 0, "completion": [BLUE]}] * 2} | {"ranks": [1, 2]},
        ["conversations=talk"],
    ),
    "two answers, another name": (TWO | {"preference_strength": 1, "ask": "Sky?"}, ["prompt=ask"]),
    "sides that begin alike": (
        {"context": "Sky?", "chosen": "The sky is blue.", "rejected": "The sky is red."},
        ["'context' would be left unread", "'The sky is'", "--columns prompt=context"],
    ),
    "answers alone": (
        {"ask": "Sky?", "chosen": [BLUE], "rejected": [RED]},
        ["'ask' would be left unread"],
    ),
    "a system alone": (
        {"ask": "Sky?", "chosen": [SYSTEM, BLUE], "rejected": [SYSTEM, RED]},
        ["--columns prompt=ask"],
    ),
    "context beside a question": (
        {"question": "Sky?", "context": "It is noon.", **SIDES},
        ["'context' goes with the prompt", "--columns input=context", "input=none"],
    ),
    "input beside a prompt": (
        {"prompt": "Translate:", "input": "Sky", **SIDES},
        ["'input' goes with the prompt", "question=NAME input=input"],
    ),
    "history beside a prompt": (
        {"prompt": "Sky?", "history": [["a", "b"]], **SIDES},
        ["'history' goes with the prompt"],
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_text_that_could_be_the_prompt_is_never_left_unread(name):
    row, reasons = LOST[name]
    with pytest.raises(DataError) as caught:
        SchemaReader(row).read(row)
    for reason in reasons:
        assert reason in str(caught.value)


def test_the_columns_that_the_errors_name_are_taken():
    row = LOST["rated, context of text"][0]
    assert read(row, columns={"prompt": "context"})[1] == TEXTS
    assert read(row, columns={"question": "context"})[1] == CHAT
    assert read(row, columns={"prompt": "none"})[1] == ("", "Blue.", "Red.")
    assert read(LOST["rated, messages"][0], columns={"conversations": "dialogue"})[1] == CHAT
    row = LOST["context beside a question"][0]
    assert read(row, columns={"input": "none"})[1] == CHAT
    assert read(row, columns={"input": "context"})[1][0] == [user("Sky?\nIt is noon.")]
    row = LOST["sides that begin alike"][0]
    assert read(row, columns={"prompt": "none"})[1][0] == "The sky is"
    # A copy of what is read is no loss, nor is what only describes the row.
    copies = {"prompt": "It is noon. Sky?", "context": "It is noon.", **SIDES}
    assert read(copies)[1][0] == "It is noon. Sky?"
    assert read({1: 2, "prompt": "Sky?", **SIDES})[1] == TEXTS  # a column without a name
    about = {"chosen": "Say: a", "rejected": "Say: b", "source": "x", "prompt_id": "y"}
    assert read(about)[1] == ("Say:", " a", " b")


def test_a_table_is_read_as_its_rows_are():
    from datasets import Dataset

    row = LOST["sides that begin alike"][0]
    with pytest.raises(DataError, match=r"mine row 0: .*--columns prompt=context"):
        list(rows_from(Dataset.from_list([row]), "mine").preferences())
    for row, expected, _ in FORMS.values():
        ((_, (found,)),) = rows_from(Dataset.from_list([row]), "mine").preferences()
        assert parts_of(found) == expected


def table():
    lines = []
    for name, (row, *_) in FORMS.items():
        reader, parts = read(row)
        lines += [name, f"  {reader.describe()}"]
        lines += [
            f"  {role:9} {part}"
            for role, part in zip(("prompt", "chosen", "rejected"), parts, strict=True)
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")

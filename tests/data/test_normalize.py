import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from fastdpo.data import DataError
from fastdpo.data.normalize import is_blank, preference_row, split_shared


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
CHAT = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


def parts(row):
    found = preference_row(row)
    return found.prompt, found.chosen, found.rejected


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
            "messages": [user("q"), assistant("something else")],
            "score_chosen": 8.0,
        },
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
        {
            "prompt": [user("q")],
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
        },
    ],
    ids=["explicit", "implicit", "ultrafeedback", "answers", "string answers", "repeated prompt"],
)
def test_every_shape_of_a_conversation_comes_out_the_same(row):
    before = json.dumps(row)
    assert parts(row) == ([user("q")], [assistant("a")], [assistant("b")])
    assert preference_row(row).is_conversational
    assert json.dumps(row) == before


def test_a_prompt_string_goes_behind_a_shared_system_turn():
    row = {"prompt": "q", "chosen": [SYSTEM, assistant("a")], "rejected": [SYSTEM, assistant("b")]}
    assert parts(row) == ([SYSTEM, user("q")], [assistant("a")], [assistant("b")])


def test_longer_shared_conversations_are_the_prompt():
    shared = [SYSTEM, user("q"), assistant("a"), user("r")]
    row = {
        "prompt": "r",
        "chosen": [*shared, assistant("x")],
        "rejected": [*shared, assistant("y")],
    }
    assert parts(row) == (shared, [assistant("x")], [assistant("y")])


def test_identical_conversations_keep_their_last_turn():
    turns = [user("q"), assistant("a")]
    for row in (
        {"chosen": turns, "rejected": turns},
        {"prompt": "q", "chosen": turns, "rejected": turns},
    ):
        assert parts(row) == ([user("q")], [assistant("a")], [assistant("a")])


text = st.text(alphabet="ab ", max_size=8)


@given(text, text, text)
def test_the_implicit_prompt_of_strings_is_trls(shared, one, other):
    chosen, rejected = shared + one, shared + other
    found = split_shared(chosen, rejected)
    assert found[0] + found[1] == chosen
    assert found[0] + found[2] == rejected
    # TRL fails on empty strings, and reads chosen[-1] as the character before the first one.
    if chosen and rejected and chosen[0] == rejected[0]:
        assert dict(zip(("prompt", "chosen", "rejected"), found, strict=True)) == extract_prompt(
            {"chosen": chosen, "rejected": rejected}
        )


def test_all_forms_of_trls_zen_set(shared_data):
    forms = json.loads((shared_data / "prefs/norm/trl_zen_all_forms.json").read_text())
    accepted = set()
    for form, rows in forms.items():
        if not {"chosen", "rejected"} <= rows[0].keys():
            with pytest.raises(DataError, match=r"field '(chosen|rejected)' is missing"):
                preference_row(rows[0])
            continue
        accepted.add(form)
        for row in rows:
            expected = row if "prompt" in row else extract_prompt(row)
            assert parts(row) == tuple(expected[name] for name in ("prompt", "chosen", "rejected"))
    assert len(accepted) == 4


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"rejected": None}, "'rejected'", "null"),
        ({"chosen": 3}, "'chosen'", r"a number \(3\)"),
        ({"prompt": True}, "'prompt'", "a boolean"),
        ({"prompt": {"role": "user"}}, "'prompt'", "an object"),
        ({"chosen": "text"}, "'chosen'", "both have to be strings or both"),
        ({"chosen": ["text"]}, r"chosen\[0\]", "a string"),
        ({"chosen": [{"content": "a"}]}, r"chosen\[0\]", "has no 'role'"),
        ({"chosen": [{"role": "assistant"}]}, r"chosen\[0\]", "has no 'content'"),
        ({"chosen": [assistant(None)]}, r"chosen\[0\]", "has no 'content'"),
        ({"rejected": [assistant("a"), assistant(4)]}, r"rejected\[1\]", r"a number \(4\)"),
        ({"chosen": [{"from": "me", "value": "a"}]}, r"chosen\[0\]", "'me', which is no speaker"),
        ({"chosen": [{"from": "gpt", "text": "a"}]}, r"chosen\[0\]", "'from', 'text'"),
        ({"chosen": [assistant([{"type": "image"}])]}, r"chosen\[0\]", "not supported"),
        ({"tools": "{"}, "'tools'", "not JSON"),
        ({"tools": 3}, "'tools'", "a number"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs'", "a list"),
    ],
)
def test_a_malformed_row_names_field_and_reason(change, field, reason):
    with pytest.raises(DataError, match=field) as caught:
        preference_row(CHAT | change)
    assert caught.match(reason)


def test_missing_fields_and_rows_that_are_none():
    with pytest.raises(DataError, match=r"'rejected' is missing.*'prompt', 'chosen'"):
        preference_row({"prompt": "a", "chosen": "b"})
    with pytest.raises(DataError, match="the row is a list"):
        preference_row([1])  # type: ignore[arg-type]


def test_null_keys_tools_and_template_variables():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    row = preference_row(
        CHAT
        | {"chosen": [call], "tools": '[{"name": "f"}]'}
        | {"chat_template_kwargs": {"enable_thinking": False, "other": None}}
    )
    assert row.chosen == [{"role": "assistant", "tool_calls": [{"name": "f"}]}]
    assert row.tools == [{"name": "f"}]
    assert row.chat_template_kwargs == {"enable_thinking": False}


def test_what_is_blank():
    assert is_blank(" \n")
    assert is_blank([])
    assert is_blank([assistant("\t")])
    assert is_blank([assistant([{"type": "text", "text": " "}])])
    assert not is_blank("a")
    assert not is_blank([assistant(""), assistant("a")])
    assert not is_blank([{"role": "assistant", "tool_calls": [{"name": "f"}]}])


# A prompt that the completions repeat

Q, A, B = user("Name a colour."), assistant("Blue."), assistant("Dog.")
SPACED = user(" Name a  colour.\n")
EARLIER = [user("Hi"), assistant("Hello.")]
PARTED = {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}


@pytest.mark.parametrize(
    ("prompt", "start", "expected"),
    [
        ([SYSTEM, Q], [Q], [SYSTEM, Q]),
        ([SYSTEM, Q], [SYSTEM, Q], [SYSTEM, Q]),
        ([SYSTEM, Q], [SYSTEM, SPACED], [SYSTEM, Q]),
        ([Q], [SPACED], [Q]),
        ([SPACED], [Q], [SPACED]),
        ([Q], [PARTED], [Q]),
        ([Q], [SYSTEM, Q], [SYSTEM, Q]),
        ([Q], [SYSTEM, SPACED], [SYSTEM, Q]),
        ([SYSTEM, *EARLIER, Q], [*EARLIER, Q], [SYSTEM, *EARLIER, Q]),
        ([SYSTEM, *EARLIER, Q], [Q], [SYSTEM, *EARLIER, Q]),
        ([SYSTEM, Q, A], [Q, A], [SYSTEM, Q, A]),
        ("Name a colour.", [SPACED], [user("Name a colour.")]),
        ("Name a colour.", [SYSTEM, Q], [SYSTEM, Q]),
    ],
)
def test_a_prompt_that_is_repeated_otherwise_is_no_part_of_the_answer(prompt, start, expected):
    for sides in (([*start, A], [*start, B]), ([*start, A], [B]), ([A], [*start, B])):
        if start[0] == SYSTEM and sides[0][0] != sides[1][0] and SYSTEM not in [*prompt]:
            continue  # a system's turn of one side alone
        row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        assert parts(row)[1:] == ([A], [B])
        assert [m["content"].split() if isinstance(m["content"], str) else 0
                for m in parts(row)[0]] == [m["content"].split() for m in expected]  # fmt: skip


def test_conversations_that_share_their_question_but_for_white_space():
    assert parts({"chosen": [Q, A], "rejected": [SPACED, B]}) == ([Q], [A], [B])


@pytest.mark.parametrize(
    "chosen",
    [[user("Another?"), A], [SYSTEM, user("Another?"), A], [SYSTEM, A]],
)
def test_an_answer_that_begins_with_another_question_is_refused(chosen):
    row = {"prompt": [{"role": "system", "content": "Else."}, Q], "chosen": chosen, "rejected": [B]}
    with pytest.raises(DataError, match=r"'chosen' begins with a (user|system)'s turn"):
        preference_row(row)


def test_a_conversation_that_goes_on_with_the_user_is_left_as_it_is():
    more = [user("And?"), assistant("Red.")]
    row = {"prompt": [Q, A], "chosen": more, "rejected": [user("Or?"), B]}
    assert parts(row) == ([Q, A], more, [user("Or?"), B])

"""Token ids and masks of every form beside TRL's own preparation and its collator."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig as TheirConfig
from trl import DPOTrainer as TheirTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from fastdpo.data import DataError, prepare_pairs, read_rows, rows_from
from fastdpo.options import TokenizationOptions
from tests.data.test_tokenize import ids_of

TEMPLATES = ("qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training", "phi3", "phi3_training")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def theirs(tokenizer, rows, **options):
    """(prompt, chosen, rejected) ids of each row, by TRL 1.16's DPOTrainer._prepare_dataset."""
    config = TheirConfig(output_dir="unused", bf16=False, **({"max_length": None} | options))
    prepared = TheirTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, config, "train"
    )
    return [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in prepared]


def assert_same(tokenizer, rows, at_least, **options):
    """Ours are theirs, but for rows without a prompt token or with equal completions."""
    pairs = prepare_pairs(
        rows_from(rows, "rows"),
        tokenizer,
        TokenizationOptions(**({"max_length": None} | options)),
        progress=False,
    )
    expected = theirs(tokenizer, rows)
    for pair in pairs:
        assert ids_of(pair) == tuple(expected[pair.row]), pair.row
    for row in set(range(len(rows))) - {pair.row for pair in pairs}:
        prompt, chosen, rejected = expected[row]
        assert not prompt or chosen == rejected
    assert len(pairs) >= at_least
    return pairs


@pytest.fixture
def gpt2(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers/gpt2")


@pytest.fixture(params=TEMPLATES)
def chat(request, shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/minimind_chatml")
    tokenizer.chat_template = (shared_data / f"templates/{request.param}.jinja").read_text()
    return tokenizer


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def conversations(shared_data, language, count):
    """Real conversations: those with a system turn first."""
    path = shared_data / f"prefs/norm/llamafactory_dpo_{language}_demo_conv.jsonl"
    rows = [dict(row) for row in read_rows(str(path)).rows]
    rows.sort(key=lambda row: row["prompt"][0]["role"] != "system")
    assert rows[count // 2]["prompt"][0]["role"] == "system"
    return rows[:count]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_conversations_with_system_turns(shared_data, chat, language, soak):
    rows = conversations(shared_data, language, 60 if soak else 20)
    assert_same(chat, rows, at_least=len(rows))


def test_tools_calls_and_their_answers(chat):
    question = [message("user", "Will it rain in Oslo?")]
    requested = [message("assistant", "", tool_calls=[CALL])]
    rows = [
        {
            "prompt": question,
            "chosen": [message("assistant", "Let me look.")],
            "rejected": [message("assistant", "No idea.")],
            "tools": json.dumps([WEATHER]),
        },
        {
            "prompt": [
                message("system", "Be brief."),
                *question,
                *requested,
                message("tool", "rain"),
            ],
            "chosen": [message("assistant", "It will.")],
            "rejected": [message("assistant", "It may well do so.")],
            "tools": json.dumps([WEATHER]),
        },
        {
            "prompt": question,
            "chosen": requested,
            "rejected": [message("assistant", "No.")],
            "tools": json.dumps([WEATHER]),
        },
    ]
    for row in rows:  # one by one: a table of all would fill absent keys with nulls
        try:
            expected = theirs(chat, [row])
        except Exception as error:
            with pytest.raises(DataError, match=f"chat template refuses.*{type(error).__name__}"):
                prepare_pairs(rows_from([row], "rows"), chat)
            continue
        if "tool_calls" not in str(chat.chat_template) and "tool_calls" in str(row):
            with pytest.raises(DataError, match="leaves out the turn of the role 'assistant' and"):
                prepare_pairs(rows_from([row], "rows"), chat)  # TRL trains without the call
            continue
        (pair,) = prepare_pairs(rows_from([row], "rows"), chat)
        assert [ids_of(pair)] == expected


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("thought", ["none", "inside", "beside"])
def test_thinking(chat, variables, thought):
    def answer(text):
        if thought == "beside":
            return message("assistant", text, reasoning_content="Hm, well.")
        return message("assistant", "<think>\nHm.\n</think>\n\n" * (thought == "inside") + text)

    rows = [
        {
            "prompt": [message("user", "hi"), answer("hello"), message("user", "2 + 2?")],
            "chosen": [answer("4")],
            "rejected": [answer("5")],
            "chat_template_kwargs": variables or {"unused": 1},
        }
    ]
    assert_same(chat, rows, at_least=1)


def test_implicit_prompts_and_several_turns_in_a_completion(chat):
    first = [message("user", "hi"), message("assistant", "hello")]
    rows = [
        {
            "chosen": [*first, message("user", "a"), message("assistant", "b")],
            "rejected": [*first, message("user", "c"), message("assistant", "d")],
        },
        {
            "chosen": [message("user", "hi"), message("assistant", "b")],
            "rejected": [message("user", "hi"), message("assistant", "d")],
        },
    ]
    assert_same(chat, rows, at_least=2)


def test_every_form_of_the_zen_set(shared_data, gpt2):
    chatml = AutoTokenizer.from_pretrained(shared_data / "tokenizers/minimind_chatml")
    forms = json.loads((shared_data / "prefs/norm/trl_zen_all_forms.json").read_text())
    assert len(forms) == 13
    compared = 0
    for name, rows in forms.items():
        tokenizer = chatml if name.startswith("conversational") else gpt2
        if "preference" in name and "unpaired" not in name:
            compared += len(assert_same(tokenizer, rows, at_least=15))
        else:
            with pytest.raises(DataError, match=r"row 0: .*(recognised are|which is the better)"):
                prepare_pairs(rows_from(rows, name), tokenizer)
    assert compared >= 4 * 15


def test_rasbt(shared_data, gpt2, soak):
    rows = read_rows(str(shared_data / "prefs/norm/rasbt_alpaca_pref.jsonl")).rows
    rows = [dict(row) for row in rows][: None if soak else 200]
    assert_same(gpt2, rows, at_least=len(rows) - 6)


def test_masks_and_cuts_are_those_of_their_collator(shared_data, gpt2):
    rows = [
        dict(r) for r in read_rows(str(shared_data / "prefs/norm/rasbt_alpaca_pref.jsonl")).rows
    ]
    limits = {"max_length": 70}
    pairs = prepare_pairs(
        rows_from(rows[:60], "rows"),
        gpt2,
        TokenizationOptions(truncation_mode="keep_start", **limits),
    )
    kept = theirs(gpt2, rows[:60], **limits)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = DataCollatorForPreference(pad_token_id=0, **limits)(
        [dict(zip(names, parts, strict=True)) for parts in kept]
    )
    pairs_of_theirs = []
    for chosen, rejected in zip(range(len(kept)), range(len(kept), 2 * len(kept)), strict=True):
        parts = []
        for place in (chosen, rejected):
            ids = batch["input_ids"][place][batch["attention_mask"][place] == 1].tolist()
            scored = batch["completion_mask"][place][batch["attention_mask"][place] == 1].tolist()
            start = scored.index(1) if 1 in scored else len(scored)
            assert scored == [0] * start + [1] * (len(scored) - start)
            parts += [ids[:start], ids[start:]]
        assert parts[0] == parts[2]
        pairs_of_theirs.append((parts[0], parts[1], parts[3]))
    expected = [parts for parts in pairs_of_theirs if parts[1] != parts[2]]
    assert [ids_of(pair) for pair in pairs] == expected
    assert pairs.report.truncated_completions > 10
    assert len(expected) > 30


# Where TRL has no reader: the text


def test_raw_sharegpt_as_text(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/minimind_chatml")
    tokenizer.chat_template = (shared_data / "templates/qwen2_5.jinja").read_text()
    rows = read_rows(str(shared_data / "prefs/raw/llamafactory_dpo_en_demo.json"))
    some = rows.take(range(30))
    pairs = prepare_pairs(some, tokenizer, TokenizationOptions(max_length=None))
    for pair in pairs:
        row = some.rows[pair.row]
        turns = row["conversations"]
        system = [] if turns[0]["from"] == "system" else ["system\nYou are Qwen"]
        text = tokenizer.decode(pair.prompt_ids)
        names = {"human": "user", "gpt": "assistant", "system": "system"}
        heads = system + [f"{names[turn['from']]}\n{turn['value']}" for turn in turns]
        places = [text.index(f"<|im_start|>{head}") for head in heads]
        assert places == sorted(places)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        for ids, side in zip(pair.completions, ("chosen", "rejected"), strict=True):
            assert tokenizer.decode(ids) == row[side]["value"] + "<|im_end|>\n"


def test_raw_alpaca_as_text(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "hf/stories260K")
    rows = read_rows(str(shared_data / "prefs/raw/rasbt_instruction-data-with-preference.json"))
    pair = prepare_pairs(rows.take([0]), tokenizer)[0]
    assert tokenizer.decode(pair.prompt_ids).removeprefix("<s>").strip() == (
        "User:\nEvaluate the following phrase by transforming it into the spelling given.\n"
        "freind --> friend\n\nAssistant:"
    )
    assert tokenizer.decode(pair.chosen_ids).strip() == (
        'The spelling of the given phrase "freind" is incorrect, the correct spelling is '
        '"friend".</s>'
    )

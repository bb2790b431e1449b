"""Ready-made text: one BOS and one EOS whoever adds them, and text that was not meant as such."""

import pytest
from transformers import AutoTokenizer

from fastdpo.data import DataError, prepare_pairs, rows_from
from tests.data.test_tokenize import chat, ids_of, prepare, strings

FOLDERS = {"chatml": "tokenizers/minimind_chatml", "llama": "hf/stories260K",
           "gpt2": "tokenizers/gpt2", "neox": "tokenizers/gpt_neox_20b"}  # fmt: skip


@pytest.fixture
def load(shared_data):
    return lambda name: AutoTokenizer.from_pretrained(shared_data / FOLDERS[name])


def ends_with_eos(tokenizer, only_if_absent):
    """Let a tokenizer put EOS behind every text, or behind those that have none."""

    class Adding(type(tokenizer)):
        def __call__(self, texts, add_special_tokens=True, **options):
            made = super().__call__(texts, add_special_tokens=add_special_tokens, **options)
            if add_special_tokens:
                made["input_ids"] = [
                    ids if only_if_absent and ids[-1:] == [self.eos_token_id]
                    else [*ids, self.eos_token_id]
                    for ids in made["input_ids"]
                ]  # fmt: skip
            return made

    tokenizer.__class__ = Adding
    return tokenizer


# EOS

ENDS = ["", "{eos}", "{eos}\n", "{eos}{eos}", "{eos}\n{eos}", "{eos} \n {eos}\n\n", "\n{eos}"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("adds", ["nothing", "always", "if absent"])
def test_a_ready_made_answer_ends_with_exactly_one_eos_whoever_adds_it(load, name, end, adds):
    tokenizer = load(name)
    expected = ids_of(prepare(tokenizer, strings("One", " two", " three"))[0])
    if adds != "nothing":
        tokenizer = ends_with_eos(tokenizer, adds == "if absent")
    written = end.format(eos=tokenizer.eos_token)
    found = ids_of(prepare(tokenizer, strings("One", f" two{written}", f" three{written}"))[0])
    eos = tokenizer.eos_token_id
    assert [ids.count(eos) for ids in found] == [int(found[0][:1] == [eos]), 1, 1]  # GPT-2's BOS
    assert [ids[-1] for ids in found[1:]] == [eos, eos]
    if written.startswith(tokenizer.eos_token) or not written:
        assert found == expected


@pytest.mark.parametrize("adds", ["nothing", "always", "if absent"])
def test_an_eos_inside_the_prompt_stays_as_it_is_written(load, adds):
    tokenizer = load("llama")
    if adds != "nothing":
        tokenizer = ends_with_eos(tokenizer, adds == "if absent")
    prompt, chosen, _ = ids_of(prepare(tokenizer, strings("a</s> b</s>", " c", " d"))[0])
    assert (prompt.count(2), prompt[-1], chosen.count(2)) == (2, 2, 1)


@pytest.mark.parametrize(
    "end", ["{eos}", "{eos}\n", "{eos}\n{eos}", "{eos}{eos}\n", "{eos}\n\n{eos}\n"]
)
def test_a_conversation_ends_with_one_eos_where_its_template_writes_two(load, end):
    tokenizer = load("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}"
        + end.format(eos="<|im_end|>").replace("\n", "{{ '\\n' }}") + "{% endif %}"
    )  # fmt: skip
    _, chosen, _ = ids_of(prepare(tokenizer, chat("q", "yes", "no"))[0])
    assert chosen.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(chosen).rstrip() == "yes<|im_end|>"


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize("which", ["eos_token", "bos_token"])
def test_a_bos_or_eos_that_is_no_token_is_refused(load, name, which):
    tokenizer = load(name)
    setattr(tokenizer, which, "<|not there|>")
    if getattr(tokenizer, f"{which}_id") in tokenizer.added_tokens_decoder:
        added = tokenizer.added_tokens_decoder[getattr(tokenizer, f"{which}_id")]
        if added.content == "<|not there|>":
            pytest.skip("this tokenizer adds it")
    for row in (strings("a", " b", " c"), chat("a", "b", "c")):
        with pytest.raises(
            DataError, match=rf"tokenizer\.{which} is '<\|not there\|>', which is no"
        ):
            prepare(tokenizer, row)


# Text


@pytest.mark.parametrize("code", [0xD83D, 0xDC00])
def test_half_a_surrogate_pair_in_a_row_from_python_is_named(load, code):
    half = chr(code)
    good = strings("a", " b", " c")
    for name in ("prompt", "chosen", "rejected"):
        row = good | {name: f"x {half}"}
        with pytest.raises(DataError, match=rf"rows row 1: .*\\u{code:04x}, half of a surrog"):
            prepare(load("gpt2"), good, row)
    row = chat("a", "b", "c", tools=[{"name": half}])
    with pytest.raises(DataError, match="half of a surrogate"):
        prepare(load("chatml"), row)
    row = strings("a", " b", " c") | {"note": half}  # not read
    assert len(prepare(load("gpt2"), row)) == 1


WARNING = "warning: the tokenizer has a chat template, and the rows are ready-made text"


def test_an_instruct_model_given_bare_text_warns_once(load):
    rows = [strings(f"Write {n}.", " Blue.", " Red.") for n in range(3)]
    described = prepare(load("chatml"), *rows).report.describe()
    assert described.count(WARNING) == 1
    assert "--columns question=prompt" in described
    formatted = strings("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes", "No")
    assert WARNING not in prepare(load("chatml"), *rows, formatted).report.describe()
    assert WARNING not in prepare(load("chatml"), chat("a", "b", "c")).report.describe()
    assert WARNING not in prepare(load("gpt2"), *rows).report.describe()
    as_question = rows_from(rows, "rows", columns={"question": "prompt"})
    assert WARNING not in prepare_pairs(as_question, load("chatml")).report.describe()
    # A template without special tokens: what it writes behind a question says the same.
    tokenizer = load("gpt2")
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    marked = strings("[INST] Write. [/INST]", " Blue.", " Red.")
    assert WARNING not in prepare(tokenizer, marked).report.describe()
    assert WARNING in prepare(tokenizer, *rows).report.describe()


def test_rows_without_a_prompt_are_told(load):
    described = prepare(load("llama"), strings("", "b", "c"), strings("a", " b", " c")).report
    assert "warning: 1 rows have no prompt" in described.describe()
    described = prepare(load("llama"), strings("<s>", "b", "c"), strings("a", " b", " c")).report
    assert "warning: 1 rows have no prompt" in described.describe()
    assert "no prompt" not in prepare(load("llama"), strings("a", " b", " c")).report.describe()


def test_a_prompt_that_is_repeated_with_other_white_space_is_told(load):
    text = "Tell me about  the sea.\n"
    repeated = strings(text, "Tell me about the sea. It is wet.", f" {text}No.")
    described = prepare(load("gpt2"), repeated).report.describe()
    assert "warning: in 1 rows both completions begin with the prompt once more" in described


# Scores


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
     ("chosen-rating", "rejected-rating"), ("chosen_avg_rating", "rejected_avg_rating"),
     ("reward_chosen", "reward_rejected")],
)  # fmt: skip
def test_scores_that_say_the_opposite_are_told(load, chosen, rejected):
    def scored(*margins):
        rows = [
            strings(f"q {n}", " Dog.", " Blue.") | {chosen: 5.0, rejected: 5 - margin}
            for n, margin in enumerate(margins)
        ]
        return prepare(load("llama"), *rows).report.describe()

    assert "in every row that scores both sides (2 of 2) the score of the rejected" in scored(
        -1, -3
    )
    assert "in 67% of the rows" in scored(-1, -3, 2)
    for agreeing in ((1, 2), (0, 0), (-1, 1)):
        assert "warning" not in scored(*agreeing)


def test_numbers_that_are_no_scores_of_the_sides_are_left_alone(load):
    for more in (
        {"chosen_tokens": 1, "rejected_tokens": 9},
        {"score_chosen": 1},
        {"score_chosen": None, "score_rejected": 9},
        {"score_chosen": "good", "score_rejected": "bad"},
        {"scored_chosen": 1, "scored_rejected": 9},
    ):
        report = prepare(load("llama"), strings("q", " Dog.", " Blue.") | more).report
        assert "warning" not in report.describe()
    text = strings("q", " Dog.", " Blue.") | {"score_chosen": "1", "score_rejected": "9.5"}
    assert "in every row" in prepare(load("llama"), text).report.describe()  # CSV

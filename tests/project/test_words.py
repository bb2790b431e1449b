"""One word for one thing, the field's: sources and pages are searched for the words that are not.

`docs/glossary.md` says what the words mean. Code that a reader meets under its name in PyTorch,
transformers or TRL is not renamed by this test: it looks at our own identifiers, comments, strings
with a space in them (messages and docstrings), and pages.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

PROSE = {
    r"\bcards?\b": "GPU",
    r"\bfigures?\b": "metric, number, or plot",
    r"\btrunks?\b": "prefix",
    r"\bbranch(es)?\b": "suffix",
    r"\b(packed|padded|unpadded) rows?\b": "packed or padded sequence",
    r"(?<!over-)\b(long|longer|longest|fullest) rows?\b": "sequence",
    r"\brows? (is|are|was|were) (packed|padded)\b": "sequence",
    r"\brows(,| that| which)? (packed|padded|shar(e|es|ing))\b": "sequence",
    r"\b(in|into|along) one row\b": "one sequence",
    r"\balong (the|a) row\b": "sequence",
}
"""Patterns of prose that no source or page has, and the word that is meant."""

ALLOWED_IN = {"fastdpo/trainer/model_card.py": "GPU", "kernels/fastdpo_kernels/": "suffix"}
"""Places where a card is a model card, or a branch is LoRA's or a compiler's."""

SEQUENCE_ROOMS = ("fastdpo/batching", "fastdpo/planner")
SEQUENCES = {r"\brows?\b": "sequence, completion or token"}
"""Further patterns of rooms whose rows can only be packed sequences."""

ALLOWED_PROSE = (
    r"model cards?",
    r"\bcard_?data\b",
    r"(LoRA|LoRA's|adapter|adapter's|low-rank|git|new)\s+branch(es)?",
    r"branch, tag( name,?)? or commit",
    r"matplotlib('s)? figures?",
    r"plt\.figure|figure\.dpi",
    r"(embedding|head|weight|vocabulary|data|data set's|data sets')('s)?\s+rows?",
    r"^ +row(?=: index of)",
    r"rows?\s+of\s+(the|an?)\s+(\w+\s+)?(head|table|weight|matrix|source|data set|file)",
)
"""Phrases in which a forbidden word is the field's own; they are taken out before the search."""

IDENTIFIERS = {
    r"cards?": "GPU",
    r"figures?": "metric",
    r"trunks?": "prefix",
    r"branch(es)?": "suffix",
    r"(token|normal|recogn|summar|initial|optim|serial|quant|special|organ|real|util|minim|maxim"
    r"|synchron|standard|factor|vector|general|final|random|material|categor)is"
    r"(e|es|ed|er|ers|ing|ation|ations)": "-ize, as transformers spells it",
    r"(col|behavi|neighb|fav|hon|lab)ours?": "-or, as transformers spells it",
    r"centred?|licence|labell(ed|ing)|modell(ed|ing)": "American spelling",
}
"""Words inside identifiers (split at underscores and capitals) that none of ours has."""

ALLOWED_IDENTIFIERS = (
    r"model_?cards?", r"card_?data", r"lora_branch(es)?", r"git_branch",
)  # fmt: skip
"""Parts of identifiers that are the field's own: Hugging Face's model cards, LoRA's branch."""

PACKED_ROWS = r"_?Row|\w*(longest|packed|padded)_rows?\w*|row_tokens|tokens_(of|in)_row"
"""Identifiers that call a packed sequence a row."""

OPENINGS = r"(Of|As|What|Whether|The same)\b"
"""How no docstring begins: none of these is a sentence without the code beside it."""

ROOMS = [
    *sorted(path for path in (ROOT / "fastdpo").iterdir() if not path.name.startswith("__pycache")),
    ROOT / "kernels" / "fastdpo_kernels",
    ROOT / "docs",
    ROOT / "examples",
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]


class Found(NamedTuple):
    """A word that should be another one, with the line on which it stands."""

    line: int
    text: str
    instead: str


def in_prose(text: str, first_line: int = 1, patterns: dict[str, str] = PROSE) -> Iterator[Found]:
    """Words of a text that the patterns forbid, less the phrases of `ALLOWED_PROSE`."""
    for phrase in ALLOWED_PROSE:  # blanked, so that places stay as they are
        text = re.sub(
            phrase, lambda found: " " * len(found[0]), text, flags=re.IGNORECASE | re.MULTILINE
        )
    for pattern, instead in patterns.items():
        for found in re.finditer(pattern, text, re.IGNORECASE):
            yield Found(first_line + text[: found.start()].count("\n"), found[0], instead)


def in_identifier(name: str, line: int) -> Iterator[Found]:
    """Words of an identifier that `IDENTIFIERS` forbids."""
    if re.fullmatch(PACKED_ROWS, name):
        yield Found(line, name, "sequence")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    for phrase in ALLOWED_IDENTIFIERS:
        snake = re.sub(rf"(^|_){phrase}(?=$|_)", "_", snake)
    for word in snake.split("_"):
        for pattern, instead in IDENTIFIERS.items():
            if re.fullmatch(pattern, word):
                yield Found(line, name, instead)


def in_python(source: str, patterns: dict[str, str] = PROSE) -> Iterator[Found]:
    """Everything wrong in a Python source: identifiers, comments, strings and docstrings."""
    for kind, text, (line, _), _, whole in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind == tokenize.NAME and not re.search(r"(plt|matplotlib)\.figure", whole):
            yield from in_identifier(text, line)
        elif kind == tokenize.COMMENT or (kind in STRINGS and " " in text.strip()):
            yield from in_prose(text, line, patterns)
    for line, docstring in docstrings(ast.parse(source)):
        if opening := re.match(OPENINGS, docstring.strip()):
            first = docstring.strip().splitlines()[0]
            yield Found(line, first, f"a whole sentence, none that begins with {opening[0]}")


STRINGS = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
"""Kinds of tokens that hold text; from Python 3.12 on the text of an f-string is one of its own."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Docstrings with their lines, those below an attribute or a constant among them."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str() as text)):
                yield node.lineno, text


def in_file(path: Path) -> Iterator[Found]:
    """Everything wrong in a file, by its kind."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".py":
        found = in_python(text, PROSE | SEQUENCES if name.startswith(SEQUENCE_ROOMS) else PROSE)
        allowed = {word for place, word in ALLOWED_IN.items() if name.startswith(place)}
        yield from (each for each in found if each.instead not in allowed)
    elif path.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            yield from in_prose("".join(cell["source"]))
    elif path.suffix in (".md", ".yaml"):
        yield from in_prose(text)


def in_room(room: Path) -> list[str]:
    """Everything wrong in a file or in all files of a folder, one line each."""
    paths = sorted(room.rglob("*")) if room.is_dir() else [room]
    return [
        f"{path.relative_to(ROOT)}:{found.line}: {found.text!r}; say {found.instead}"
        for path in paths
        if path.suffix in (".py", ".md", ".yaml", ".ipynb")
        for found in in_file(path)
    ]


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.stem)
def test_a_room_speaks_the_fields_words(room):
    wrong = in_room(room)
    assert not wrong, "\n".join(
        [*wrong, "Should a phrase be the field's own: ALLOWED_PROSE or ALLOWED_IDENTIFIERS."]
    )


@pytest.mark.parametrize(
    "source",
    [
        "card = 1",
        "memory_of_cards = 1",
        "class PairFigures: ...",
        "def normalise(x): ...",
        "colour = 'red'",
        "def f(tokenised): ...",
        "longest_row = 3",
        "class Row: ...",
        "x = 1  # the trunk of a group",
        "raise ValueError('the card has too little memory')",
        'def f():\n    """Of a pair, its tokens."""',
        'class A:\n    """As before."""',
        'X = 1\n"""What it is."""',
        "x = 1  # completions lie in one row",
        "print(f'{n} padded rows of {m}')",
    ],
)
def test_a_wrong_word_is_found(source):
    assert len(list(in_python(source))) == 1


def test_the_fields_own_uses_pass():
    for source in (
        "def write_model_card(card_data): ...",
        "from huggingface_hub import ModelCard, ModelCardData",
        "lora_branch = 1  # the LoRA branch, and a git branch",
        "figure = plt.figure(figsize=(8, 4))",
        "x = 'card'  # a model card's key",
        "rows = read_rows(path)  # the longest over-long rows of the data set",
        'def f():\n    """Return the rows of the head; optimizer, color, normalize."""',
        "noise = precise = advise = otherwise = exercise = 1",
    ):
        assert list(in_python(source)) == [], source

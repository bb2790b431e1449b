import json
from itertools import count, islice

import numpy as np
import pytest

from fastdpo.cli.parser import parse
from fastdpo.data import (
    DataError,
    MixedRows,
    UnknownSplitError,
    get_dataset,
    prepare_pairs,
    read_held_out,
    read_mixture,
    read_rows,
    rows_from,
)
from fastdpo.options.data import DataOptions, DatasetConfig, DatasetMixtureConfig, ScriptArguments


def row(number):
    return {"prompt": f"p{number}", "chosen": f" good {number}", "rejected": f" bad {number}"}


def json_lines(folder, name, rows):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def prompts_of(rows):
    return [preferences[0].prompt for _, preferences in rows.preferences()]


@pytest.fixture
def gpt2(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "tokenizers/gpt2")


# Files


def test_csv_keeps_line_numbers_quotes_and_digits(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,chosen,rejected\r\n"a, ""b""\nc",2,3\r\n\r\nd,4,\r\n')
    rows = read_rows(str(path))
    assert list(rows.rows) == [
        {"prompt": 'a, "b"\nc', "chosen": "2", "rejected": "3"},
        {"prompt": "d", "chosen": "4", "rejected": ""},
    ]
    assert [rows.where(i) for i in range(2)] == [f"{path}:3", f"{path}:5"]
    tabs = tmp_path / "pairs.tsv"
    tabs.write_text("prompt\tchosen\trejected\na, b\tc\td\n")
    assert read_rows(str(tabs)).rows[0]["prompt"] == "a, b"


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (b"prompt,chosen,rejected\na,b\n", ":2", "has 2 fields and the header 3"),
        (b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", ":3", "has 4 fields"),
        (b"prompt,prompt,rejected\na,b,c\n", ":1", "names a column twice"),
        (b'prompt,chosen,rejected\na,"b,c\n', ":2", "no valid CSV"),
        (b"prompt,chosen,rejected\na,b,c\na,\xff,c\n", ":3", "is not UTF-8"),
        (b"", "", "there are no rows"),
        (b"prompt,chosen,rejected\n", "", "there are no rows"),
    ],
)
def test_bad_csv_names_the_line(tmp_path, content, place, reason):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_rows(str(path))
    assert str(caught.value).startswith(f"{path}{place}: ")


def test_columns_that_nobody_reads_are_not_taken_out_of_a_table(tmp_path):
    from datasets import Dataset

    table = Dataset.from_list([row(i) | {"messages": [1, 2]} for i in range(3)])
    table.to_parquet(tmp_path / "pairs.parquet")
    rows = read_rows(str(tmp_path / "pairs.parquet"))
    told: list[str] = []
    assert [number for number, _ in rows.preferences(told)] == [0, 1, 2]
    assert told == [
        "read as standard, rendered as ready-made text, from the columns prompt, chosen, rejected; "
        "not read: messages"
    ]


def test_a_table_of_images_is_refused_before_one_is_decoded():
    from datasets import Dataset, Features, Image, List, Value

    features = Features({"prompt": Value("string"), "pictures": List(Image())})
    table = Dataset.from_dict({"prompt": ["a"], "pictures": [[]]}, features=features)
    with pytest.raises(DataError, match="mine: column 'pictures' is of type Image"):
        rows_from(table, "mine")


def test_a_transform_of_a_dataset_is_what_is_read(gpt2):
    from datasets import Dataset

    def add(batch):
        return batch | {"prompt": [f"SYS: {prompt}" for prompt in batch["prompt"]]}

    def rename(batch):
        return {"prompt": batch["ask"], "chosen": batch["yes"], "rejected": batch["no"]}

    table = Dataset.from_list([row(n) for n in range(3)])
    for transformed in (table.with_transform(add), table.with_format("custom", transform=add)):
        rows = rows_from(transformed, "mine")
        assert prompts_of(rows) == [transformed[n]["prompt"] for n in range(3)]
        assert prompts_of(rows) == ["SYS: p0", "SYS: p1", "SYS: p2"]
        assert prompts_of(rows.take([2, 0])) == ["SYS: p2", "SYS: p0"]
        assert len(prepare_pairs(rows, gpt2)) == len(rows) == 3
    in_place = Dataset.from_list([row(0)])
    in_place.set_transform(add)
    assert prompts_of(rows_from(in_place, "mine")) == ["SYS: p0"]
    other = Dataset.from_list([{"ask": "q", "yes": " a", "no": " b"}]).with_transform(rename)
    assert prompts_of(rows_from(other, "mine")) == ["q"]
    for kind in ("numpy", "torch", "pandas", "arrow"):
        assert prompts_of(rows_from(table.with_format(kind), "mine")) == ["p0", "p1", "p2"]
    bad = table.with_transform(lambda batch: batch | {"chosen": [None] * len(batch["chosen"])})
    with pytest.raises(DataError, match="mine row 0: field 'chosen' is null"):
        prompts_of(rows_from(bad, "mine"))


# Splits


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:90%]", range(9)),
        ("train[90%:]", [9]),
        ("train[2:4]", [2, 3]),
        ("train[-3:]", [7, 8, 9]),
        ("train[:1]+train[5:7]", [0, 5, 6]),
    ],
)
def test_slices_of_a_file_are_those_of_datasets_and_keep_their_places(tmp_path, split, numbers):
    path = json_lines(tmp_path, "pairs.jsonl", map(row, range(10)))
    rows = read_rows(path, split=split)
    assert prompts_of(rows) == [f"p{n}" for n in numbers]
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}:{n + 1}" for n in numbers]
    assert prompts_of(read_held_out(path, split=split)) == prompts_of(rows)
    from datasets import Dataset

    Dataset.from_list([row(n) for n in range(10)]).to_parquet(tmp_path / "p.parquet")
    table = read_rows(str(tmp_path / "p.parquet"), split=split)
    assert prompts_of(table) == prompts_of(rows)
    assert table.where(0).endswith(f" row {numbers[0]}")


@pytest.mark.parametrize("split", ["test", "test[:10%]", "train[", "train[:a]"])
def test_a_file_has_no_other_split(tmp_path, split):
    path = json_lines(tmp_path, "pairs.jsonl", [row(0)])
    with pytest.raises(UnknownSplitError, match="one split, 'train'"):
        read_rows(path, split=split)


def test_saved_folders_with_and_without_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([row(n) for n in range(10)])
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table, "test": table.select([3])}).save_to_disk(tmp_path / "two")
    assert len(read_rows(str(tmp_path / "one"))) == 10
    with pytest.raises(UnknownSplitError, match=r"has \['train'\]"):
        read_rows(str(tmp_path / "one"), split="test")
    assert prompts_of(read_rows(str(tmp_path / "two"), split="test")) == ["p3"]
    assert prompts_of(read_rows(str(tmp_path / "two"), split="train[:20%]")) == ["p0", "p1"]


def test_a_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    json_lines(folder, "train.jsonl", map(row, range(4)))
    json_lines(folder, "test.jsonl", map(row, range(4, 6)))
    assert prompts_of(read_rows(str(folder))) == ["p0", "p1", "p2", "p3"]
    assert prompts_of(read_rows(str(folder), split="test")) == ["p4", "p5"]
    stream = read_rows(str(folder), streaming=True)
    assert stream.is_stream
    assert prompts_of(stream) == ["p0", "p1", "p2", "p3"]


# Streams


def test_generators_and_iterable_datasets_are_streams(gpt2):
    from datasets import Dataset

    table = Dataset.from_list([row(n) for n in range(5)])
    whole = prepare_pairs(rows_from(table, "mine"), gpt2)
    for given in ((row(n) for n in range(5)), table.to_iterable_dataset()):
        rows = rows_from(given, "mine")
        assert rows.is_stream
        with pytest.raises(TypeError, match="mine is a stream"):
            len(rows)
        pairs = prepare_pairs(rows, gpt2, progress=False)
        assert [p.chosen_ids.tolist() for p in pairs] == [p.chosen_ids.tolist() for p in whole]


@pytest.mark.parametrize("limit", [1, 5, 512, 600])
def test_a_stream_without_end_is_read_no_further_than_the_limit(gpt2, limit):
    requested = []

    def rows():
        for number in count():
            requested.append(number)
            yield row(number) if number % 3 else row(number) | {"rejected": f" good {number}"}

    pairs = prepare_pairs(rows_from(rows(), "mine"), gpt2, limit=limit, progress=False)
    assert len(pairs) == limit == pairs.report.pairs_kept
    dropped = pairs.report.dropped["identical completions"].count
    assert len(requested) == pairs.report.rows_read == limit + dropped
    assert [pair.row for pair in pairs] == list(islice((n for n in count() if n % 3), limit))
    assert f"stopped at {limit} pairs" in pairs.report.describe()
    # The same pairs as without a stream, where the limit counts just so.
    finite = rows_from(list(islice((row(n) for n in count()), 700)), "mine")
    assert len(prepare_pairs(finite, gpt2, limit=limit, progress=False)) == limit


def test_a_bad_row_of_a_stream_does_not_read_it_to_its_end(gpt2):
    rows = rows_from(({"prompt": "a", "chosen": n, "rejected": "c"} for n in count()), "mine")
    with pytest.raises(DataError, match=r"mine row 0: field 'chosen' is a number \(0\)") as caught:
        prepare_pairs(rows, gpt2)
    assert "later rows" not in str(caught.value)


def test_a_limit_cuts_the_pairs_of_a_rated_row_and_needs_a_number(gpt2):
    rated = {"prompt": "q", "completions": [" a", " b", " c"], "ratings": [1, 2, 3]}
    rows = rows_from([rated, rated], "mine", rated_pairs="all")
    assert len(prepare_pairs(rows, gpt2, limit=2)) == 2
    with pytest.raises(ValueError, match="limit is 0"):
        prepare_pairs(rows, gpt2, limit=0)


# Mixtures


def mixture(tmp_path, sizes=(10, 4), fractions=(None, None), **options):
    names = ("one.jsonl", "two.jsonl")
    entries = []
    for place, (name, size, fraction) in enumerate(zip(names, sizes, fractions, strict=True)):
        path = json_lines(tmp_path, name, (row(100 * place + n) for n in range(size)))
        entries.append({"path": path, "fraction": fraction})
    return DatasetMixtureConfig(datasets=entries, **options)


def test_a_mixture_is_read_set_by_set_each_in_its_shape(tmp_path, gpt2):
    turns = {"question": "q", "chosen": "good", "rejected": "bad"}
    texts = json_lines(tmp_path, "texts.jsonl", map(row, range(3)))
    requested = [{"ask": f"a{n}", "yes": " y", "no": " n", "prompt": "other"} for n in range(2)]
    renamed = json_lines(tmp_path, "renamed.jsonl", requested)
    columns = ["prompt=ask", "chosen=yes", "rejected=no"]
    rows, held_out = read_mixture(
        DatasetMixtureConfig([{"path": texts}, {"path": renamed, "columns": columns}])
    )
    assert held_out is None
    assert prompts_of(rows) == ["p0", "p1", "p2", "a0", "a1"]
    assert [rows.where(i) for i in (2, 3, 4)] == [f"{texts}:3", f"{renamed}:1", f"{renamed}:2"]
    pairs = prepare_pairs(rows, gpt2)
    assert pairs.report.source == f"{texts} + {renamed}"
    assert len(pairs.report.shapes) == 2
    assert pairs.report.shapes[1].startswith(f"{renamed} (2 rows): read as standard")
    bad = json_lines(tmp_path, "turns.jsonl", [turns, turns | {"chosen": None}])
    rows, _ = read_mixture(DatasetMixtureConfig([{"path": texts}, {"path": bad}]))
    with pytest.raises(DataError, match=r"turns\.jsonl:2: field 'chosen' is null"):
        prepare_pairs(rows, gpt2)


@pytest.mark.parametrize("fractions", [(None, None), (0.5, 0.5), (3, 1), (1, 0), (5, 3)])
def test_shares_are_those_of_trl(tmp_path, fractions, monkeypatch):
    from trl.scripts.utils import DatasetConfig as TheirConfig
    from trl.scripts.utils import DatasetMixtureConfig as TheirMixture
    from trl.scripts.utils import get_dataset as theirs

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    ours = mixture(tmp_path, fractions=fractions)
    expected = theirs(
        TheirMixture(
            [
                TheirConfig("json", data_files=entry.path, fraction=entry.fraction)
                for entry in ours.datasets
            ]
        )
    )
    assert list(get_dataset(ours)) == list(expected) == ["train"]
    assert get_dataset(ours)["train"].to_list() == expected["train"].to_list()
    assert prompts_of(read_mixture(ours)[0]) == expected["train"]["prompt"]


def test_a_seed_draws_the_rows_of_a_fraction(tmp_path):
    def drawn(seed):
        made = mixture(tmp_path, fractions=(0.5, 0.5), mixture_seed=seed)
        return prompts_of(read_mixture(made)[0])

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None)[:4] == ["p0", "p1", "p2", "p3"]
    assert len(drawn(1)) == 8
    assert sorted(drawn(1)[4:]) == ["p100", "p101", "p102", "p103"]


@pytest.mark.parametrize(("size", "held"), [(0.25, 4), (3, 3), (0.01, 1)])
def test_the_held_out_part_is_drawn_from_all_sets_and_shared_by_none(tmp_path, size, held):
    made = mixture(tmp_path, test_split_size=size)
    train, test = read_mixture(made)
    assert test is not None
    assert isinstance(test, MixedRows)
    assert len(test) == held
    assert sorted(prompts_of(train) + prompts_of(test)) == sorted(
        f"p{100 * place + n}" for place, many in enumerate((10, 4)) for n in range(many)
    )
    assert prompts_of(read_mixture(made)[1]) == prompts_of(test)
    both = get_dataset(made)
    assert both["test"]["prompt"] == prompts_of(test)
    assert both["train"]["prompt"] == prompts_of(train)
    other = mixture(tmp_path, test_split_size=size, mixture_seed=5)
    assert prompts_of(read_mixture(other)[1]) != prompts_of(test)
    for i in range(len(test)):
        assert test.where(i).rpartition(":")[0] in {part.source for part in test.parts}


def test_mixtures_select_and_rename_columns(tmp_path):
    rows = [row(n) | {"score": n} for n in range(3)]
    one = json_lines(tmp_path, "one.jsonl", rows)
    keep = DatasetConfig(one, columns=["prompt", "chosen", "rejected"])
    two = json_lines(tmp_path, "two.jsonl", [{"ask": "a", "chosen": " b", "rejected": " c"}])
    rename = DatasetConfig(two, columns={"prompt": "ask"})
    combined = get_dataset(DatasetMixtureConfig([keep, rename]))["train"]
    assert set(combined.column_names) == {"prompt", "chosen", "rejected"}
    assert combined["prompt"] == ["p0", "p1", "p2", "a"]
    with pytest.raises(DataError, match=r"asks for the columns \['nowhere'\]"):
        get_dataset(DatasetMixtureConfig([DatasetConfig(one, columns=["nowhere"])]))
    numbers = json_lines(tmp_path, "three.jsonl", [{"prompt": 1, "chosen": 2, "rejected": 3}])
    with pytest.raises(DataError, match="different columns"):
        get_dataset(DatasetMixtureConfig([keep, {"path": numbers}]))
    with pytest.raises(DataError, match="names no data set"):
        read_mixture(DatasetMixtureConfig())


def test_the_names_and_defaults_of_trls_mixture_and_script_arguments():
    import dataclasses

    import trl
    from trl.scripts.utils import DatasetConfig as TheirConfig

    for mine, theirs, own in (
        (DatasetConfig, TheirConfig, set()),
        (DatasetMixtureConfig, trl.DatasetMixtureConfig, {"mixture_seed"}),
        (ScriptArguments, trl.ScriptArguments, set()),
    ):
        fields = {f.name: f.default for f in dataclasses.fields(mine)}
        expected = {f.name: f.default for f in dataclasses.fields(theirs)}
        assert fields.keys() - own == expected.keys()
        assert {name: fields[name] for name in expected} == expected
    parser = trl.TrlParser((ScriptArguments, DatasetMixtureConfig))
    script, mixed = parser.parse_args_and_config(["--dataset_name", "a", "--streaming"])
    assert (script.dataset_name, mixed.streaming, mixed.datasets) == ("a", True, [])


# Options


def _in_memory(rows, reading):
    return rows_from(rows, "mine", columns=reading["columns"], rated_pairs=reading["rated_pairs"])


def options(*argv):
    return parse("train", [DataOptions], argv, training=False).data


def test_options_of_the_command_line_and_of_yaml(tmp_path):
    found = options("--columns", "prompt=ask", "chosen=yes", "--rated_pairs", "all", "--streaming")
    assert found.columns == ["prompt=ask", "chosen=yes"]
    assert (found.rated_pairs, found.dataset_streaming, found.mixture) == ("all", True, None)
    rated = {"ask": "q", "completions": ["a", "b", "c"], "ratings": [1, 2, 3]}
    path = json_lines(tmp_path, "rated.jsonl", [rated])
    found.columns = ["prompt=ask"]
    reading = read_rows(path, **found.reading), _in_memory([rated], found.reading)
    mixed = read_mixture(DatasetMixtureConfig([{"path": path, "columns": found.columns}]))[0]
    for rows, pairs in zip((*reading, mixed), (3, 3, 1), strict=True):
        assert [len(preferences) for _, preferences in rows.preferences()] == [pairs]
    assert found.reading["max_line_mib"] == 16
    path = tmp_path / "run.yaml"
    path.write_text(
        "datasets:\n  - path: a.jsonl\n    fraction: 0.5\n"
        "  - path: somebody/pairs\n    name: big\n    split: train[:10%]\n    fraction: 0.5\n"
        "    columns: [prompt=ask]\ntest_split_size: 0.1\nmixture_seed: 3\n"
    )
    mixed = options("--config", str(path)).mixture
    assert mixed == DatasetMixtureConfig(
        [
            DatasetConfig("a.jsonl", fraction=0.5),
            DatasetConfig(
                "somebody/pairs", "big", split="train[:10%]", fraction=0.5, columns=["prompt=ask"]
            ),
        ],
        test_split_size=0.1,
        mixture_seed=3,
    )


MIX = [{"path": "a"}, {"path": "b"}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"columns": ["prompt"]}, "--columns has 'prompt'; write role=column"),
        ({"rated_pairs": "first"}, "--rated_pairs is 'first'"),
        ({"test_split_size": 0.1}, "no datasets are given"),
        ({"mixture_seed": 1}, "no datasets are given"),
        ({"datasets": ["a.jsonl"]}, "each entry needs keys"),
        ({"datasets": [{"name": "a"}]}, "an entry without a path"),
        ({"datasets": [{"path": 3}]}, "the path of a dataset is 3"),
        ({"datasets": [{"path": "a", "weight": 1}]}, "the key 'weight'; known are path, name"),
        ({"datasets": [{"path": "a", "fraction": -1}]}, "--datasets fraction is -1"),
        ({"datasets": [{"path": "a", "fraction": 1}, {"path": "b"}]}, "1 of 2 have a fraction"),
        ({"datasets": [{"path": "a", "fraction": 0}]}, "every fraction is 0"),
        ({"datasets": MIX, "test_split_size": 0}, "--test_split_size is 0"),
        ({"datasets": MIX, "test_split_size": 1.5}, "round it"),
        ({"datasets": MIX, "test_split_size": 2, "dataset_streaming": True}, "no end to hold"),
        (
            {"datasets": [{"path": "a", "fraction": 1}], "dataset_streaming": True},
            "a fraction needs the number of rows",
        ),
    ],
)
def test_wrong_data_options_name_their_flag(values, words):
    with pytest.raises(ValueError, match="--") as caught:
        DataOptions(**values)
    assert words in str(caught.value)


def test_a_share_that_leaves_nothing_on_one_side_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds 14 of 14 rows out"):
        read_mixture(mixture(tmp_path, test_split_size=14))
    assert np.all([part.is_stream is False for part in read_mixture(mixture(tmp_path))[0].parts])

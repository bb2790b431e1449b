"""`python -m fastdpo.score`: the same rows with metrics; and it agrees with evaluate."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyarrow import parquet
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo import evaluate, score
from fastdpo.cli.parser import command
from fastdpo.demo.build import make_tokenizer
from fastdpo.system import files
from tests.tiny_trainer import plain_logps

TOKENIZER = make_tokenizer()
COLUMNS = (
    "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_rewards",
    "rejected_rewards", "margin", "prompt_tokens", "chosen_tokens", "rejected_tokens",
    "truncated_prompt", "truncated_chosen", "truncated_rejected", "dropped",
)  # fmt: skip
ROWS = [
    {"prompt": "say it ", "chosen": "kindly", "rejected": "gruffly, now", "source": "a", "id": 7},
    {"prompt": "say it ", "chosen": "the same", "rejected": "the same", "source": "a"},
    {"prompt": "b" * 50, "chosen": "y" * 30, "rejected": "no", "source": "b"},
    {"prompt": "say ", "chosen": "", "rejected": "gruff", "extra": {"who": ["me", "ünïcode"]}},
    {"prompt": "once more ", "chosen": "well said indeed", "rejected": "x", "source": "b"},
    {"prompt": "c" * 10, "chosen": "y" * 80, "rejected": "n" * 80, "source": "b"},
    {"prompt": "p ", "chosen": "q" * 90 + "a", "rejected": "q" * 90 + "b"},
]
CUT = ["--max_length", "64"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter on it, the base with all weights moved, and the rows."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name in ("base", "trained"):
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "adapter")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return folder


@pytest.fixture
def workplace(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ADAPTER = ["--model", "base", "--adapter", "adapter", "--dataset", "rows.jsonl"]


def read_scores(path="scores.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_agrees_with_plain_transformers_and_with_evaluate(workplace, capsys, kind):
    base = AutoModelForCausalLM.from_pretrained("base")
    if kind == "adapter":
        argv = ADAPTER
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    else:
        argv = ["--model", "trained", "--reference", "base", "--dataset", "rows.jsonl"]
        policy = AutoModelForCausalLM.from_pretrained("trained")
    score.main([*argv, "--beta", "0.3"])
    assert "written to scores.jsonl" in capsys.readouterr().out
    scores = read_scores()
    kept = [i for i, found in enumerate(scores) if found["dropped"] is None]
    assert kept == [0, 2, 4, 5, 6]
    for i in kept:
        expected, ref_expected = (plain_logps(m, ROWS[i], TOKENIZER) for m in (policy, base))
        found = scores[i]
        logps = [found["chosen_logps"], found["rejected_logps"]]
        ref_logps = [found["ref_chosen_logps"], found["ref_rejected_logps"]]
        np.testing.assert_allclose(logps, expected, atol=1e-4)
        np.testing.assert_allclose(ref_logps, ref_expected, atol=1e-4)
        logratios = np.subtract(logps, ref_logps)
        rewards = [found["chosen_rewards"], found["rejected_rewards"]]
        np.testing.assert_allclose(rewards, 0.3 * logratios)
        assert found["margin"] == pytest.approx(logratios[0] - logratios[1])
        assert abs(found["margin"]) > 1e-3
    evaluate.main([*argv, "--beta", "0.3", "--num_completions", "0"])
    beside = "adapter" if "--adapter" in argv else ""
    metrics = json.loads(Path(beside, "evaluation.json").read_text())
    margins = np.array([scores[i]["margin"] for i in kept])
    assert metrics["pairs"] == len(kept)
    assert metrics["preference"]["margin"] == pytest.approx(margins.mean(), abs=1e-4)
    assert metrics["preference"]["rewards_margin"] == pytest.approx(0.3 * margins.mean(), abs=1e-4)
    assert metrics["preference"]["preference_accuracy"] == pytest.approx((margins > 0).mean())
    for side in ("chosen", "rejected"):
        for who, prefix in (("policy", ""), ("reference", "ref_")):
            logps = np.array([scores[i][f"{prefix}{side}_logps"] for i in kept])
            tokens = sum(scores[i][f"{side}_tokens"] for i in kept)
            assert metrics[who][f"logps_{side}"] == pytest.approx(logps.mean(), abs=1e-4)
            perplexity = np.exp(-logps.sum() / tokens)
            assert metrics[who][f"perplexity_{side}"] == pytest.approx(perplexity, rel=1e-4)


def test_row_i_is_row_i_with_reasons_and_cuts(workplace):
    score.main([*ADAPTER, *CUT])
    scores = read_scores()
    for row, found in zip(ROWS, scores, strict=True):
        assert {name: found[name] for name in row} == row
        assert list(found) == [*row, *COLUMNS]
    assert [found["dropped"] for found in scores] == [
        None, "identical completions", None, "empty completion", None, None,
        "identical completions after truncation",
    ]  # fmt: skip
    for index in (1, 3, 6):
        assert all(scores[index][name] is None for name in COLUMNS if name != "dropped")
    cuts = [[found[f"truncated_{part}"] for part in ("prompt", "chosen", "rejected")]
            for found in scores]  # fmt: skip
    assert cuts[0] == cuts[4] == [False, False, False]
    assert cuts[2] == [True, False, False]
    assert cuts[5] == [False, True, True]
    for index in (2, 5):
        found = scores[index]
        assert found["prompt_tokens"] + found["chosen_tokens"] == 64


def test_parquet_holds_the_same(workplace):
    score.main([*ADAPTER, *CUT])
    score.main([*ADAPTER, *CUT, "--output_file", "scores.parquet"])
    table = parquet.read_table("scores.parquet")
    assert table.num_rows == len(ROWS)
    for found, expected in zip(table.to_pylist(), read_scores(), strict=True):
        assert {name: found[name] for name in expected} == expected
        assert all(value is None for name, value in found.items() if name not in expected)
    types = {name: str(table.schema.field(name).type) for name in COLUMNS}
    assert set(types.values()) == {"double", "int64", "bool", "string"}
    assert types["margin"] == "double"
    assert types["chosen_tokens"] == "int64"


def test_parquet_in_keeps_every_column(workplace):
    table = pyarrow.Table.from_pylist([{**row, "id": i} for i, row in enumerate(ROWS[:3])])
    parquet.write_table(table, "rows.parquet")
    score.main([*ADAPTER[:4], "--dataset", "rows.parquet"])
    assert [(row["id"], row["source"]) for row in read_scores()] == [(0, "a"), (1, "a"), (2, "b")]


def test_parquet_in_many_batches(workplace, monkeypatch):
    """Columns that show only in a later batch are there; no batch holds all rows."""
    monkeypatch.setattr("fastdpo.evaluation.scored_rows.ROWS_AT_ONCE", 2)
    score.main([*ADAPTER, "--output_file", "scores.parquet"])
    file = parquet.ParquetFile("scores.parquet")
    assert file.num_row_groups == 4
    assert file.read().column("extra").to_pylist()[3] == {"who": ["me", "ünïcode"]}


def test_a_second_models_figures_fit_beside_the_first(workplace):
    score.main(ADAPTER)
    again = ["--model", "trained", "--reference", "base", "--dataset", "scores.jsonl"]
    with pytest.raises(ValueError, match=r"scores.jsonl:1 has the column 'chosen_logps' already"):
        score.main([*again, "--output_file", "both.jsonl"])
    score.main([*again, "--output_file", "both.jsonl", "--column_prefix", "full_"])
    first = read_scores("both.jsonl")[0]
    assert first["chosen_logps"] != first["full_chosen_logps"]
    assert first["ref_chosen_logps"] == first["full_ref_chosen_logps"]


def test_four_bits(workplace):
    score.main([*ADAPTER, "--output_file", "dense.jsonl"])
    score.main([*ADAPTER, "--qlora"])
    dense, coarse = read_scores("dense.jsonl")[0], read_scores()[0]
    assert abs(coarse["ref_chosen_logps"] - dense["ref_chosen_logps"]) > 1e-3


def test_a_failing_disk_leaves_the_earlier_file(workplace, monkeypatch):
    Path("scores.jsonl").write_text("earlier")

    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        score.main(ADAPTER)
    assert Path("scores.jsonl").read_text() == "earlier"
    assert not list(workplace.glob(f"{files.TEMPORARY_MARK}*"))


def test_log_probs_that_are_not_finite_are_refused(workplace):
    model = AutoModelForCausalLM.from_pretrained("trained")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained("trained")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the log-probs are"):
        score.main(["--model", "trained", "--reference", "base", "--dataset", "rows.jsonl"])
    assert not Path("scores.jsonl").exists()


MIXED = [{**ROWS[0], "note": 1}, {**ROWS[0], "note": "text"}]
RATED = [{"prompt": "p", "completions": ["one", "two", "six"], "ratings": [1, 2, 3]}]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "rows.jsonl"], "there is nothing to compare"),
        (["--adapter", "nowhere", "--dataset", "rows.jsonl"], "nowhere holds no adapter"),
        (["--adapter", "base", "--dataset", "rows.jsonl"], "base holds no adapter"),
        ([*ADAPTER, "--reference", "base"], "exclude each other"),
        ([*ADAPTER[:4]], "--dataset is missing"),
        ([*ADAPTER[:4], "--dataset", "none.jsonl"], "there is no file none.jsonl"),
        ([*ADAPTER, "--output_file", "scores.txt"], "one of .jsonl, .parquet"),
        ([*ADAPTER, "--beta", "0"], "--beta is 0.0"),
        ([*ADAPTER, "--strict_data"], "rows.jsonl:4: empty completion"),
        ([*ADAPTER, "--lora_r", "8"], "--lora_r changes nothing here"),
        ([*ADAPTER, "--dataset_streaming"], "--dataset_streaming changes nothing here"),
        (["--model", "./nowhere", *ADAPTER[2:]], "./nowhere"),
        (
            [*ADAPTER[:4], "--dataset", "mixed.jsonl", "--output_file", "s.parquet"],
            "write a .jsonl",
        ),
        ([*ADAPTER[:4], "--dataset", "rated.jsonl", "--rated_pairs", "all"], "several pairs a row"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(workplace, monkeypatch, capsys, argv, message):
    Path("mixed.jsonl").write_text("\n".join(map(json.dumps, MIXED)))
    Path("rated.jsonl").write_text("\n".join(map(json.dumps, RATED)))
    monkeypatch.setattr("sys.argv", ["score", *argv])
    try:
        code = command(score.main)
    except SystemExit as stop:
        code = stop.code
    complaint = capsys.readouterr().err
    assert code == 2
    assert message in complaint
    assert "Traceback" not in complaint


def test_evaluation_shows_parts(workplace, capsys):
    """Pairs by length, and by source where rows say one."""
    score.main(ADAPTER)
    evaluate.main([*ADAPTER, "--num_completions", "0"])
    assert "chosen is longer" in capsys.readouterr().out
    shares = {
        part["name"]: part
        for part in json.loads(Path("adapter/evaluation.json").read_text())["shares"]
    }
    scores = [found for found in read_scores() if found["dropped"] is None]

    def expect(name, part):
        margins = np.array([found["margin"] for found in part])
        assert shares[name]["pairs"] == len(margins) > 0
        assert shares[name]["preference_accuracy"] == pytest.approx((margins > 0).mean())
        assert shares[name]["rewards_margin"] == pytest.approx(0.1 * margins.mean(), abs=1e-5)

    lengths = [found["chosen_tokens"] - found["rejected_tokens"] for found in scores]
    expect("chosen is shorter", [s for s, d in zip(scores, lengths, strict=True) if d < 0])
    expect("both are as long", [s for s, d in zip(scores, lengths, strict=True) if d == 0])
    expect("chosen is longer", [s for s, d in zip(scores, lengths, strict=True) if d > 0])
    expect("source a", [s for s in scores if s.get("source") == "a"])
    expect("source b", [s for s in scores if s.get("source") == "b"])
    assert len(shares) == 5

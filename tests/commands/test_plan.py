"""`python -m fastdpo.plan`: what it prints, refuses and exits with; a subprocess for the help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdpo import plan
from fastdpo.options import MODEL_ALIASES
from fastdpo.plan import PlanningOptions
from fastdpo.planner import Plan, gpu_spec

ROOT = Path(__file__).parents[2]
SMALL = ["--longest_pairs", "false", "--host_memory_gib", "32"]


@pytest.fixture
def said(capsys):
    """Run the command; what it printed, and its exit code."""

    def run(*argv: str) -> tuple[str, int]:
        code = 0
        try:
            plan.main(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
        return capsys.readouterr().out, code

    return run


def test_the_main_job(said):
    out, code = said("--model", "llama-7b", "--qlora", "--gpu", "24GiB", "--host_memory_gib", "64")
    assert code == 0
    assert "llama-7b means meta-llama/Llama-2-7b-hf" in out
    assert "6.74B parameters, QLoRA r=16, pairs up to 2 x 1,024 tokens" in out
    for term in ("linear layers", "adapters", "optimizer state", "CUDA context", "pinned host"):
        assert term in out
    assert "an estimate" in out
    assert "adamw_8bit" not in out, "only where 2 x max_length fits in no other way"
    pairs = {}
    by_length, by_base = out.split("By the way to hold the base")
    for line in by_length.splitlines():
        if " GB  " in line:
            size, length = line.split(" GB ")[0], line.split("2 x ")[1].split()[0]
            pairs[int(size)] = int(length.replace(",", ""))
    assert list(pairs) == [6, 8, 12, 16, 24, 32, 48, 80]
    assert list(pairs.values()) == sorted(pairs.values())
    assert pairs[6] >= 1024
    cells = [line.split("  ") for line in by_base.splitlines() if " GB  " in line]
    cells = [[cell.strip() for cell in line if cell] for line in cells]
    assert [line[0] for line in cells] == [f"{size} GB" for size in pairs]
    said_before = [cell.split(" ")[2].rstrip(",") for _, _, cell, *_ in cells]
    assert said_before == [f"{length:,}" for length in pairs.values()]
    first = cells[0]
    assert first[1] == "-", "16 bits of a 7B do not fit 6 GB"
    assert all(cell.startswith("2 x ") and cell.endswith(" GiB") for cell in first[3:])


def test_a_base_on_the_host_is_said_and_full_tuning_has_none(said):
    argv = ("--model", "llama-3.1-8b", "--gpu", "8GiB", *SMALL)
    out, code = said(*argv, "--lora", "--base_weights", "auto")
    assert code == 0
    assert "buffers of the base" in out
    assert "The base lies in host memory (13.00 GiB pinned, 2 of its 32 blocks at a time" in out
    assert said(*argv, "--lora")[1] == 3
    with pytest.raises(ValueError, match="--base_weights is host, and all weights are trained"):
        said(*argv, "--full", "--base_weights", "host")
    out, _ = said("--model", "llama-3.2-1b", "--full", "--gpu", "80GiB", "--host_memory_gib", "1")
    assert "way to hold the base" not in out


def test_json_is_the_plan_and_nothing_else(said):
    out, code = said("--model", "qwen3-8b", "--lora", "--gpu", "rtx-4090", "--json", "true", *SMALL)
    assert code == 0
    made = Plan(**json.loads(out))
    assert made.fits
    assert made.gpu_bytes == int(23.64 * 2**30)  # of 24, what torch sees
    assert made.allocated_bytes <= made.peak_bytes == sum(made.terms.values())
    assert len(made.activation_plan) == 36


def test_attention_and_the_gpu_decide_what_is_planned(said):
    """A backend changes what backward keeps; a GPU without bfloat16 trains in float32."""

    def allocated(*argv):
        given = ("--model", "llama-3.1-8b", "--lora", "--gpu", "80", "--micro_batch_tokens", "2048")
        return json.loads(said(*given, "--json", "true", *SMALL, *argv)[0])["allocated_bytes"]

    assert allocated() == allocated("--attention", "varlen") < allocated("--attention", "flex")
    exact = allocated("--dtype", "float32")
    assert exact == allocated("--dtype", "float32", "--attention", "flex") > allocated()
    with pytest.raises(ValueError, match="--attention varlen cannot be used here: dtype is"):
        allocated("--dtype", "float32", "--attention", "varlen")
    old = ("--model", "llama-7b", "--qlora", "--gpu", "rtx-2060", "--json", "true", *SMALL)
    wide = json.loads(said(*old)[0])["terms"]["head"]
    assert wide == 2 * json.loads(said(*old, "--dtype", "float16")[0])["terms"]["head"]


def test_exit_code_3_says_what_would_make_it_fit(said):
    out, code = said(
        "--model", "llama-3.1-8b", "--qlora", "--gpu", "6", "--max_length", "8192", *SMALL
    )
    assert code == 3
    assert "does not fit" in out
    assert "shorter pairs (--max_length)" in out
    assert "a GPU of 8 GiB" in out
    out, code = said("--model", "llama-3.1-8b", "--full", "--gpu", "24GB", *SMALL)
    assert code == 3
    assert "4-bit weights (--qlora)" in out


def test_without_a_flag_it_plans_what_train_would_do(said):
    named = said("--model", "mistral-7b", "--lora", "--gpu", "24", *SMALL)
    assert said("--model", "mistral-7b", "--gpu", "24", *SMALL) == named
    assert "LoRA r=16" in named[0]


def test_an_8_bit_optimizer_is_taken_where_nothing_else_fits(said):
    out, _ = said("--model", "mistral-7b", "--full", "--gpu", "80", "--host_memory_gib", "64")
    assert "80 GB    2 x " in out
    assert "adamw_8bit" in out.splitlines()[-1]


def test_auto_explains_that_there_is_no_card(said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--gpu is auto, but torch sees no CUDA GPU.*24GiB"):
        said("--model", "llama-7b")


def test_auto_reads_what_is_free(said, monkeypatch):
    gib = 2**30
    for name, value in {
        "is_available": True, "mem_get_info": (9 * gib, 24 * gib), "memory_reserved": gib,
        "get_per_process_memory_fraction": 1.0, "get_device_name": "NVIDIA GeForce RTX 4090",
        "get_device_capability": (8, 9),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    out, code = said("--model", "llama-7b", "--qlora", *SMALL)
    assert code == 0
    assert "GPU: NVIDIA GeForce RTX 4090" in out
    assert " of 10.60 GiB" in out  # with the context, which is made already
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.25)
    assert " of 6.60 GiB" in said("--model", "llama-7b", "--qlora", *SMALL)[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "24"], "--model is missing"),
        (["--model", "llama-7b", "--gpu", "huge"], "--gpu is 'huge'"),
        (["--model", "nobody/nothing", "--gpu", "24"], "no config of the model 'nobody/nothing'"),
        (["--model", "llama-7b", "--gpu", "24", "--optim", "adam"], "--optim is 'adam'"),
        (
            ["--model", "llama-7b", "--gpu", "24", "--lora_target_modules", "c_attn"],
            "no linear layer 'c_attn'",
        ),
    ],
)
def test_bad_input_is_explained(said, argv, message):
    with pytest.raises(ValueError, match=message):
        said(*argv)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gpu", " "), ("host_memory_gib", -1), ("max_length", 4), ("pairs_per_update", 0),
        ("micro_batch_tokens", 64),
    ],
)  # fmt: skip
def test_options_name_their_flag(option, value):
    with pytest.raises(ValueError, match=f"--{option} is "):
        PlanningOptions(**{option: value})


def test_every_family_on_every_card(said):
    for index, alias in enumerate(MODEL_ALIASES):
        for size in (8, 12, 16, 24, 80) if index < 7 else (24, 80):
            out, code = said("--model", alias, "--qlora", "--gpu", str(size), *SMALL)
            assert code in (0, 3)
            assert f"of {gpu_spec(str(size)).memory_bytes / 2**30:.2f} GiB" in out
            # The experts of gpt-oss are no linear layers, so they stay in 16 bits.
            assert code == 0 or size == 8 or (alias == "gpt-oss-20b" and size < 80)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fastdpo import plan\n"
        "try: plan.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'peft', 'datasets'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "--host_memory_gib" in ran.stdout
    assert ran.stdout.strip().endswith("[]")

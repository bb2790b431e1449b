"""A real instruct model through trl.DPOTrainer 1.16 and ours: loss and gradient norm of 10 updates.

Run by `make soak` with REAL_MODEL naming the model's folder: minutes on a CPU.
"""

import os

import pytest

BOUND = 2e-5  # relative, as in tests/trainer/test_trl_parity.py


def test_ten_updates_of_a_real_model(soak, shared_data, tmp_path):
    folder = os.environ.get("REAL_MODEL")
    if not (soak and folder):
        pytest.skip("the long form: --soak, and REAL_MODEL with the folder of an instruct model")
    pytest.importorskip("trl", reason="the oracle is trl.DPOTrainer (pip install fastdpo[dev])")
    from bench.trainers import build

    case = {
        "folder": folder, "tuning": "lora", "dtype": "float32", "device": "cpu", "pairs": 4,
        "rows": 40, "updates": 10, "accumulation": 1, "checkpointing": False, "logging_steps": 1,
        "learning_rate": 1e-4,
    }  # fmt: skip
    curves = {}
    for library in ("fastdpo", "trl"):
        work = tmp_path / library
        work.mkdir()
        trainer = build({**case, "library": library}, work, [])
        assert trainer.processing_class.chat_template
        trainer.train()
        curves[library] = [line for line in trainer.state.log_history if "loss" in line]
    assert len(curves["fastdpo"]) == len(curves["trl"]) == 10
    for ours, theirs in zip(*curves.values(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=BOUND)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5 * BOUND)

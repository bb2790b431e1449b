"""Training with other losses than DPO's equals trl.DPOTrainer 1.16: loss and gradient norm agree.

`make test` runs two updates of a few; `make soak` fifteen of each (`--soak`).
"""

import copy

import pytest
import torch
from datasets import Dataset

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.modeling.adapters import lora_config
from tests.trainer.test_trl_parity import (
    PAIRS_PER_UPDATE,
    assert_equal_curves,
    common_arguments,
    story_model,
)

trl = pytest.importorskip("trl", reason="the oracle is trl.DPOTrainer (pip install fastdpo[dev])")

__all__ = ["story_model"]  # a fixture

# What is asked for, and whether the whole update must be one micro-batch of TRL's: it sorts and
# averages over tokens per micro-batch, fastdpo per update.
CASES = {
    "hinge": ({"loss_type": ["hinge"]}, False),
    "ipo": ({"loss_type": ["ipo"]}, False),
    "apo_zero": ({"loss_type": ["apo_zero"]}, False),
    "sppo_hard": ({"loss_type": ["sppo_hard"]}, False),
    "sigmoid_norm": ({"loss_type": ["sigmoid_norm"], "beta": 2.0}, False),
    "robust smoothing": ({"loss_type": ["robust"], "label_smoothing": 0.1}, False),
    "exo_pair": ({"loss_type": ["exo_pair"], "label_smoothing": 1e-3}, False),
    "js": ({"f_divergence_type": "js_divergence"}, False),
    "wpo": ({"use_weighting": True}, False),
    "ld 0.4": ({"ld_alpha": 0.4}, False),
    "ld 0": ({"ld_alpha": 0.0, "loss_type": ["bco_pair"]}, False),
    "sft": ({"loss_type": ["sft"]}, True),
    "rpo": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.05]}, True),
    "mpo": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        True,
    ),
    "aot": ({"loss_type": ["aot"]}, True),
    "aot_unpaired": ({"loss_type": ["aot_unpaired"], "label_smoothing": 0.1}, True),
}
SHORT = ("wpo", "ld 0.4", "mpo", "aot")


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_norm_equal_trl(story_model, tmp_path, name, soak):
    if not soak and name not in SHORT:
        pytest.skip("one of the long forms: make soak")
    options, whole = CASES[name]
    updates = 15 if soak else 2
    model, tokenizer, rows = story_model
    rows = rows[: updates * PAIRS_PER_UPDATE]
    arguments = common_arguments(tmp_path, 1 if whole else 2, updates) | options
    peft_config = lora_config(16, 32, 0.0, None)
    ours = DPOTrainer(
        copy.deepcopy(model),
        args=DPOConfig(
            **arguments,
            truncation_mode="keep_start",
            ref_cache=str(tmp_path / "ref"),
            micro_batch_tokens=1024,  # several to an update
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    torch.manual_seed(ours.args.seed)  # TRL leaves the adapter's first weights to the caller
    theirs = trl.DPOTrainer(
        copy.deepcopy(model),
        args=trl.DPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
    )
    assert_equal_curves(ours, theirs, name, updates)

"""Optimizers of bitsandbytes and torch through `DPOTrainer`: train, checkpoint, resume."""

import pytest
import torch

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.modeling.adapters import lora_config
from tests.tiny_trainer import CONFIG, ROWS, TOKENIZER, tiny_base


def trained(folder, optim, steps, *, use_cpu, resume=None):
    """A rank at which the adapter's tensors are large enough for 8-bit state."""
    arguments = {"max_steps": steps, "save_steps": 2, "learning_rate": 1e-3, "use_cpu": use_cpu}
    arguments |= {"lr_scheduler_type": "constant", "disable_tqdm": True, "ref_cache": "off"}
    trainer = DPOTrainer(
        tiny_base(),
        args=DPOConfig(str(folder), optim=optim, **arguments),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
        peft_config=lora_config(64, 128, 0.0, ["q_proj", "down_proj"]),
    )
    before = [p.detach().clone() for p in trainer.policy.parameters() if p.requires_grad]
    trainer.train(resume_from_checkpoint=resume)
    after = [p.detach().cpu() for p in trainer.policy.parameters() if p.requires_grad]
    assert all((one != other.cpu()).any() for one, other in zip(after, before, strict=True))
    return trainer, after


def dtypes_of_state(trainer):
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        value.dtype
        for state in inner.state.values()
        for name, value in state.items()
        if name in ("state1", "state2", "exp_avg", "exp_avg_sq")
    }


def resume_equals_one_run(tmp_path, optim, *, use_cpu):
    whole, wanted = trained(tmp_path / "whole", optim, 4, use_cpu=use_cpu)
    expected = torch.uint8 if "8bit" in optim else torch.float32
    assert dtypes_of_state(whole) == {expected}
    trained(tmp_path / "cut", optim, 2, use_cpu=use_cpu)
    checkpoint = str(tmp_path / "cut" / "checkpoint-2")
    resumed, found = trained(tmp_path / "cut", optim, 4, use_cpu=use_cpu, resume=checkpoint)
    assert dtypes_of_state(resumed) == {expected}
    return found, wanted


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, optim):
    assert CONFIG.hidden_size * 64 == 4096, "the fewest entries that have 8-bit state"
    found, wanted = resume_equals_one_run(tmp_path, optim, use_cpu=True)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_a_resumed_run_on_the_card(tmp_path, optim):
    """R64: paged state that is loaded again."""
    found, wanted = resume_equals_one_run(tmp_path, optim, use_cpu=False)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm()

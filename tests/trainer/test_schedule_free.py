"""Schedule-free optimizers, and other ways an optimizer meets the trainer."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, get_constant_schedule

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.modeling.adapters import lora_config
from fastdpo.trainer.checkpoint import CheckpointError
from tests.tiny_trainer import HELD_OUT, ROWS, TOKENIZER, tiny_base, tiny_trainer
from tests.trainer.small_runs import ADAPTER, adapter_of, build


class ScheduleFree(torch.optim.Optimizer):
    """z is SGD and x the mean of its points; trained at y = beta x + (1 - beta) z, as Defazio's."""

    def __init__(self, parameters, lr=0.05, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _move(self, train):
        for group in self.param_groups:
            if group["train_mode"] == train:
                continue
            group["train_mode"] = train
            weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)

    def eval(self):
        self._move(False)

    def train(self):
        self._move(True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "a step between evaluation and training"
            share = 1 / (group["k"] + 1)
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share)
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class Modes(TrainerCallback):
    """Which weights the model has at each event."""

    def __init__(self):
        self.seen = set()

    def look(self, event, optimizer):
        self.seen.add((event, optimizer.param_groups[0]["train_mode"]))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.look("step", optimizer)

    def on_evaluate(self, args, state, control, optimizer=None, **_):
        self.look("evaluate", optimizer)

    def on_save(self, args, state, control, optimizer=None, **_):
        self.look("save", optimizer)


def schedule_free(folder, steps, callbacks=(), **options):
    first = tiny_trainer(tiny_base(), folder, ref_cache="off")  # for its adapted model
    optimizer = ScheduleFree([p for p in first.policy.parameters() if p.requires_grad])
    arguments = {"max_steps": steps, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    return DPOTrainer(
        first.policy,
        args=DPOConfig(
            str(folder), use_cpu=True, ref_cache="off", disable_tqdm=True, logging_steps=1,
            **arguments | options,
        ),
        train_dataset=ROWS,
        eval_dataset=HELD_OUT,
        processing_class=TOKENIZER,
        optimizers=(optimizer, get_constant_schedule(optimizer)),
        callbacks=list(callbacks),
    )  # fmt: skip


def test_the_average_is_evaluated_and_saved_and_a_resumed_run_ends_alike(tmp_path):
    modes = Modes()
    trainer = schedule_free(tmp_path / "whole", 4, [modes])
    trainer.train()
    assert modes.seen == {("step", True), ("evaluate", False), ("save", False)}
    logged = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == logged[-1] != logged[0]
    x = {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / ADAPTER)
    for name, tensor in saved.items():
        assert torch.equal(tensor, x[name.replace(".weight", ".default.weight")]), name
    trainer.optimizer.train()
    assert any((p != x[n]).any() for n, p in trainer.policy.named_parameters() if n in x)

    schedule_free(tmp_path / "cut", 2).train()
    schedule_free(tmp_path / "cut", 4).train(resume_from_checkpoint=True)
    ends = [adapter_of(tmp_path / run / "checkpoint-4") for run in ("whole", "cut")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd"])
def test_the_package_schedulefree(tmp_path, optim):
    pytest.importorskip("schedulefree")
    options = {"optim": optim, "lr_scheduler_type": "constant"}
    build(tmp_path / "whole", max_steps=4, **options).train()
    build(tmp_path / "cut", max_steps=2, **options).train()
    build(tmp_path / "cut", max_steps=4, **options).train(resume_from_checkpoint=True)
    ends = [adapter_of(tmp_path / run / "checkpoint-4") for run in ("whole", "cut")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_schedulers_that_follow_a_metric_resume(tmp_path, kind):
    options = {
        "lr_scheduler_type": kind,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    options |= {"lr_scheduler_kwargs": {"patience": 0}, "eval_rows": HELD_OUT[:4]}
    whole = build(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    build(tmp_path / "cut", max_steps=2, **options).train()
    resumed = build(tmp_path / "cut", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    rates = [
        [line["learning_rate"] for line in each.state.log_history if "learning_rate" in line]
        for each in (whole, resumed)
    ]
    assert rates[0] == rates[1]
    assert adapter_of(tmp_path / "whole" / "checkpoint-4") == adapter_of(
        tmp_path / "cut" / "checkpoint-4"
    )


def test_another_optimizer_on_resume_is_refused_by_name(tmp_path):
    build(tmp_path, max_steps=2).train()
    with pytest.raises(CheckpointError, match=r"AdamW and this run has torch\.SGD.*same --optim"):
        build(tmp_path, max_steps=4, optim="sgd").train(resume_from_checkpoint=True)


def test_a_state_that_no_checkpoint_can_hold_stops_the_run_at_its_first_update(tmp_path):
    trainer = build(tmp_path, max_steps=4)
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer.param_groups[0]["projector"] = object()
    with pytest.raises(CheckpointError, match=r"projector is a builtins\.object.*--optim"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_within_the_backward_are_refused(tmp_path, optim):
    with pytest.raises(ValueError, match=rf"--optim {optim} cannot work here: .*micro-batch"):
        build(tmp_path, optim=optim)


def own(tmp_path, make_optimizer, make_scheduler=get_constant_schedule, **options):
    """A trainer with an optimizer and a scheduler of the user's own."""
    adapted = tiny_trainer(tiny_base(), tmp_path / "first", ref_cache="off").policy
    optimizer = make_optimizer([p for p in adapted.parameters() if p.requires_grad])
    arguments = {"use_cpu": True, "ref_cache": "off", "disable_tqdm": True, "max_steps": 2}
    return DPOTrainer(
        adapted,
        args=DPOConfig(str(tmp_path / "out"), **arguments | options),
        train_dataset=ROWS,
        eval_dataset=HELD_OUT,
        processing_class=TOKENIZER,
        optimizers=(optimizer, make_scheduler(optimizer)),
    )


def test_a_scheduler_of_ones_own_that_follows_a_metric(tmp_path):
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau follows a metric.*--eval_strategy"):
        own(tmp_path, torch.optim.AdamW, plateau)
    trainer = own(tmp_path, torch.optim.AdamW, plateau, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == 2
    args = DPOConfig("unused", use_cpu=True, lr_scheduler_type="greedy", eval_strategy="steps")
    args.eval_strategy = "no"  # as the command does where there are no rows to evaluate on
    with pytest.raises(ValueError, match="greedy follows a metric"):
        DPOTrainer(tiny_base(), args=args, train_dataset=ROWS, processing_class=TOKENIZER)


def test_an_optimizer_over_other_tensors_is_refused(tmp_path):
    further = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"no parameters of the model \(1 of \d+\)"):
        own(tmp_path, lambda ps: torch.optim.SGD([*ps, further]))
    base = tiny_base()
    too_early = torch.optim.SGD(base.parameters())
    with pytest.raises(ValueError, match=r"frozen tensors alone.*after get_peft_model"):
        DPOTrainer(
            base, args=DPOConfig(str(tmp_path / "out"), use_cpu=True), train_dataset=ROWS,
            processing_class=TOKENIZER, peft_config=lora_config(4, 8, 0.0, None),
            optimizers=(too_early, None),
        )  # fmt: skip
    half = own(tmp_path, lambda ps: torch.optim.SGD(ps[::2], lr=0.1), save_strategy="no")
    half.train()

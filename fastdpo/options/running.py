"""The inherited training options that runs set most, with the presets of the command."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastdpo.options.checks import Check, Options, number, option, whole


@dataclass
class TrainerDefaults(Options):
    """The inherited training options that runs set most, with the defaults of the command.

    `python -m fastdpo.train` shows them and lays them below what the user gave; `DPOConfig` used
    from Python never sees them and keeps TRL's defaults. Types are those of TrainingArguments.
    """

    _argument_group_name = "Training (the most used; --help_all has the rest)"

    output_dir: str = option("fastdpo-output", "Folder of checkpoints, the result and its log.")
    learning_rate: float = option(1e-5, "Peak learning rate; 1e-6 where --full is given.")
    lr_scheduler_type: str = option("cosine", "Course of the learning rate after the warm-up.")
    warmup_steps: float = option(0.1, "Warm-up: below 1 a share of the run, from 1 on updates.")
    num_train_epochs: float = option(1.0, "Passes over the pairs; DPO overfits quickly.")
    max_steps: int = option(-1, "Updates, in place of epochs, if positive.")
    per_device_train_batch_size: int = option(
        32,
        "Pairs per update, times --gradient_accumulation_steps. Micro-batches are laid out by "
        "tokens, so this costs no memory. 8 where only the other one is given.",
    )
    gradient_accumulation_steps: int = option(1, "Multiplies the pairs per update, as in TRL.")
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm; 0 is no clipping.")
    optim: str = option("adamw_torch_fused", "Optimizer, for example paged_adamw_8bit.")
    logging_steps: float = option(10, "Updates between two log lines.")
    eval_strategy: str = option(
        "epoch", "When to evaluate: no, steps, epoch; steps where --eval_steps is given."
    )
    eval_steps: float | None = option(None, "Updates, or a share of the run, between evaluations.")
    save_strategy: str = option("steps", "When to write a checkpoint: no, steps, epoch, best.")
    save_steps: float = option(500, "Updates, or a share of the run, between checkpoints.")
    save_total_limit: int | None = option(None, "Most checkpoints kept; unset keeps all.")
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint folder to go on from, or true for the newest one that is whole."
    )
    allow_config_change: list[str] | None = option(
        None, "Settings in which a resumed run may differ, as its refusal names them."
    )
    seed: int = option(42, "Seed of the adapter's start and of the order of the pairs.")
    report_to: str | list[str] = option("none", "Trackers: none, trackio, tensorboard, wandb, all.")


_SHARE = "Below 1 it is a share of the run, from 1 on a number of updates."
_SEED = number("42 is usual.", at_least=0, below=2**32)

INHERITED_CHECKS: dict[str, Check] = {
    "per_device_train_batch_size": whole(1, "32 in all is usual"),
    "gradient_accumulation_steps": whole(1, "1 is usual"),
    "num_train_epochs": number("1 is usual.", above=0),
    "learning_rate": number("1e-5 is usual for an adapter.", at_least=0),
    "weight_decay": number("0 is usual.", at_least=0),
    "adam_beta1": number("0.9 is usual.", at_least=0, below=1),
    "adam_beta2": number("0.999 is usual.", at_least=0, below=1),
    "adam_epsilon": number("1e-8 is usual; at 0 a weight without gradient becomes NaN.", above=0),
    "max_grad_norm": number("1 is usual, 0 does not clip.", at_least=0),
    "warmup_steps": number(_SHARE, at_least=0),
    "logging_steps": number(_SHARE, at_least=0),
    "save_steps": number(_SHARE, at_least=0),
    "eval_steps": number(_SHARE, at_least=0),
    "seed": _SEED,
    "data_seed": _SEED,
}
"""Bounds of inherited training options that would otherwise fail late, or train in silence."""


COMMAND_DEFAULTS = {"score_turns": "assistant"}
"""Defaults of our own options in every command that has them, where `DPOConfig` keeps TRL's way."""


def presets(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command's defaults for the inherited training options, to be laid below `given`.

    Where one given option decides what another one means, the other's preset gives way: naming
    one of the two batch numbers leaves TRL's default for the other (8 and 1), `eval_steps` means
    evaluation by steps, and `full` trains at TRL's 1e-6.

    Args:
        given: what the user set, by name.

    Returns:
        Values by name; `{**presets(given), **given}` is what the run uses.
    """
    values = {entry.name: entry.default for entry in fields(TrainerDefaults)}
    if "gradient_accumulation_steps" in given:
        values["per_device_train_batch_size"] = 8
    if "eval_steps" in given:
        values["eval_strategy"] = "steps"
    if given.get("full"):
        values["learning_rate"] = 1e-6
    return values

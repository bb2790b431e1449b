"""The needs of a run besides its model and data: packages, a schedule, a folder to store in.

All of it can be known at once; found late it would cost the reference pass.
"""

import os
from pathlib import Path

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from fastdpo.config import DPOConfig
from fastdpo.options import reference_folder


def require_all(
    args: DPOConfig, *, own_optimizer: bool = False, own_schedule: bool = False
) -> None:
    """Raise ValueError for anything that the options ask for and that cannot be had.

    Args:
        args: the options of the run.
        own_optimizer: whether the user made the optimizer, whatever the options say of it.
        own_schedule: the same of the learning-rate schedule.
    """
    require_trackers(args)
    if not own_optimizer:
        require_optimizer(args)
    if not own_schedule:
        require_scheduler(args)
    require_reference_folder(args)


def require_trackers(args: DPOConfig) -> None:
    """Raise ValueError for a tracker of `--report_to` that is not installed."""
    installed = get_available_reporting_integrations()
    for name in args.report_to or ():
        if isinstance(name, str) and name not in (*installed, "none", "flyte", "kubeflow"):
            raise ValueError(
                f"--report_to is {name}, and no tracker of that name is installed here: install "
                f"it (pip install {name}), or name one of {', '.join(['none', *installed])}."
            )


def require_optimizer(args: DPOConfig) -> None:
    """Raise ValueError for an optimizer whose package is not installed or whose options are wrong.

    Those that are made for one model (GaLore, APOLLO, LOMO) are looked at without it.
    """
    name = getattr(args.optim, "value", args.optim)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, None)
    except ImportError as error:
        raise ValueError(
            f"--optim is {name}, and its package is not installed here ({_sentence(error)}): "
            "install it, or use another one, such as adamw_torch_fused or paged_adamw_8bit."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        if "need to pass a" in str(error):  # the model
            return
        raise ValueError(
            f"--optim {name} cannot be made ({_sentence(error)}): correct --optim_args (written "
            "as name=value,name=value) and --optim_target_modules, or use another one, such as "
            "adamw_torch_fused."
        ) from error


def require_scheduler(args: DPOConfig) -> None:
    """Raise ValueError for a schedule that cannot be made: its arguments do not fit it."""
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    given = args.lr_scheduler_kwargs
    assert not isinstance(given, str), "TrainingArguments has read the JSON"
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=1,
            num_training_steps=8,
            scheduler_specific_kwargs=dict(given or {}),
        )
        if name not in ("reduce_lr_on_plateau", "greedy"):  # which step by a metric
            optimizer.step()
            scheduler.step()
            scheduler.step()  # in most of them arguments are first used behind the warm-up
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--lr_scheduler_type {name} does not take --lr_scheduler_kwargs "
            f"{given or 'none'} ({_sentence(error)}): correct them, or use "
            "another schedule, such as cosine."
        ) from error


def require_reference_folder(args: DPOConfig) -> None:
    """Raise ValueError where the reference log-probs cannot be stored; nothing is created."""
    folder = None if args.sync_ref_model else reference_folder(args.ref_cache)
    if folder is None:
        return
    above: Path = folder.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(
            f"reference log-probs would be stored in {folder}, and {above} cannot be written to: "
            "pass --ref_cache FOLDER, set FASTDPO_CACHE, or pass --ref_cache off to compute them "
            "in each update."
        )


def _sentence(error: Exception) -> str:
    """The first line of an error, without its full stop."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")

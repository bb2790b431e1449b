"""Every scheduler and optimizer that torch, transformers and bitsandbytes bring: saved at each
step, a resumed run has the same learning rates, weights and state, bit for bit."""

import json

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.optimization import Adafactor, AdafactorSchedule
from transformers.training_args import OptimizerNames

from fastdpo.trainer import checkpoint
from fastdpo.trainer.checkpoint import CheckpointError
from fastdpo.trainer.optimizers import refuse_optimizer

STEPS = 7
METRICS = (0.7, 0.9, 0.95, 0.6, 0.5, 0.8, 0.7)
LR = 1e-2


class Model(nn.Module):
    """Matrices alone, since some optimizers take no others; large enough for 8-bit state."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 2, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=LR)


def constant(optimizer):
    return schedulers.LambdaLR(optimizer, lambda step: 1.0)


def started(make_optimizer, make_scheduler):
    torch.manual_seed(0)
    model = Model()
    optimizer = make_optimizer(model)
    return model, optimizer, make_scheduler(optimizer)


def update(step, model, optimizer, scheduler):
    """One update with its own inputs; returns the learning rates that it was made with."""
    rates = [float(group["lr"] or 0) for group in optimizer.param_groups]
    if callable(train := getattr(optimizer, "train", None)):
        train()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    by_metric = hasattr(scheduler, "patience")
    scheduler.step(METRICS[step]) if by_metric else scheduler.step()
    if callable(evaluate := getattr(optimizer, "eval", None)):
        evaluate()
    return rates


def tensors_in(value, path=""):
    """The tensors at any depth of a state, by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if not isinstance(value, dict | list | tuple):
        return {}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, part in parts:
        found |= tensors_in(part, f"{path}/{key}")
    return found


def assert_resumes(folder, make_optimizer, make_scheduler=constant):
    model, optimizer, scheduler = started(make_optimizer, make_scheduler)
    rates, weights = [], []
    for step in range(STEPS):
        rates.append(update(step, model, optimizer, scheduler))
        (folder / str(step)).mkdir(exist_ok=True)
        checkpoint.save_optimizer(folder / str(step), optimizer, scheduler, model)
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert any((weights[0][name] != weights[-1][name]).any() for name in weights[0])
    for saved in range(STEPS - 1):
        resumed, again, schedule = started(make_optimizer, make_scheduler)
        resumed.load_state_dict(weights[saved])
        checkpoint.load_optimizer(folder / str(saved), again, schedule, resumed)
        later = [update(step, resumed, again, schedule) for step in range(saved + 1, STEPS)]
        assert later == rates[saved + 1 :], "learning rates"
        for name, tensor in resumed.state_dict().items():
            assert torch.equal(tensor, weights[-1][name]), name
        mine, theirs = (tensors_in(each.state_dict()) for each in (again, optimizer))
        assert mine.keys() == theirs.keys()
        for path, tensor in theirs.items():
            assert mine[path].dtype == tensor.dtype, path
            assert torch.equal(mine[path], tensor), path


def decay(step):
    return 1 / (1 + step)


TORCH_SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, decay),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, decay),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1, 3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-4, LR, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, LR, 8),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1, 2), schedulers.MultiStepLR(o, [1])], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.MultiStepLR(o, [1, 3])], o
    ),
    "SWALR": lambda o: SWALR(o, 1e-4, 3),
}


@pytest.mark.parametrize("name", TORCH_SCHEDULERS)
def test_schedulers_of_torch(tmp_path, name):
    assert_resumes(tmp_path, adamw, TORCH_SCHEDULERS[name])


def test_every_scheduler_of_torch_is_tried():
    known = {
        name
        for name, kind in vars(schedulers).items()
        if isinstance(kind, type) and issubclass(kind, schedulers.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= TORCH_SCHEDULERS.keys()


NEEDS = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"patience": 0},
    "greedy": {"patience": 0, "warmup": 1, "smooth": True},
}


@pytest.mark.parametrize("kind", list(SchedulerType), ids=lambda kind: kind.value)
def test_schedulers_of_transformers(tmp_path, kind):
    def made(optimizer):
        return get_scheduler(
            kind, optimizer, 1, STEPS, scheduler_specific_kwargs=NEEDS.get(kind.value, {})
        )

    assert_resumes(tmp_path, adamw, made)


TORCH_OPTIMIZERS = {
    "ASGD": {}, "Adadelta": {}, "Adafactor": {}, "Adagrad": {}, "Adam": {"amsgrad": True},
    "AdamW": {}, "Adamax": {}, "Muon": {}, "NAdam": {}, "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True}, "Rprop": {}, "SGD": {"momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_optimizers_of_torch(tmp_path, name):
    kind = getattr(torch.optim, name)
    assert_resumes(tmp_path, lambda m: kind(m.parameters(), lr=LR, **TORCH_OPTIMIZERS[name]))


def test_every_optimizer_of_torch_is_tried():
    known = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    refused = {"LBFGS", "SparseAdam"}
    assert known - TORCH_OPTIMIZERS.keys() == {"Optimizer"} | refused
    for name in refused:
        with pytest.raises(ValueError, match=rf"{name}.*choose another"):
            refuse_optimizer(getattr(torch.optim, name)(Model().parameters()))


OTHERS = {
    "a tensor as learning rate": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(LR)),
    "a group each": lambda m: torch.optim.SGD([{"params": [p], "lr": LR} for p in m.parameters()]),
    "absolute steps": lambda m: Adafactor(
        m.parameters(), lr=LR, relative_step=False, scale_parameter=False, beta1=0.9
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers(tmp_path, name):
    assert_resumes(tmp_path, OTHERS[name])


def test_relative_steps(tmp_path):
    assert_resumes(tmp_path, lambda m: Adafactor(m.parameters(), lr=None), AdafactorSchedule)


BNB = [
    name
    for name, kind in vars(bnb.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
]


@pytest.mark.parametrize("name", BNB)
def test_optimizers_of_bitsandbytes(tmp_path, name):
    kind = getattr(bnb.optim, name)
    options = {"momentum": 0.9} if "SGD" in name or "LARS" in name else {}

    def optimizer_of(model):
        return kind(model.parameters(), lr=LR, **options)

    try:
        update(0, *started(optimizer_of, constant))
    except RuntimeError as error:
        pytest.skip(f"bitsandbytes has it on GPUs alone: {error}")
    assert_resumes(tmp_path, optimizer_of)


@pytest.mark.parametrize("kind", list(OptimizerNames), ids=lambda kind: kind.value)
def test_optimizers_by_name(tmp_path, kind):
    """Each resumes, or is refused by its name, or needs a package or device that is not here."""
    arguments = TrainingArguments(
        str(tmp_path), optim=kind, use_cpu=True, optim_target_modules=["first"]
    )
    if kind.value in ("lomo", "adalomo") or kind.value.endswith("layerwise"):
        with pytest.raises(ValueError, match=f"--optim {kind.value} .*choose another"):
            refuse_optimizer(kind)
        return
    refuse_optimizer(kind)

    def optimizer_of(model):
        made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        groups = options.pop("params", model.parameters())
        return made(groups, **{**options, "lr": LR})

    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, Model())
    except (ImportError, ValueError) as error:
        pytest.skip(f"not installed: {error}")
    try:
        model, optimizer, scheduler = started(optimizer_of, constant)
        update(0, model, optimizer, scheduler)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"not here: {error}")
    try:
        checkpoint.require_savable(optimizer, scheduler, model)
    except CheckpointError as error:
        pytest.skip(f"refused by name: {error}")
    else:
        assert_resumes(tmp_path, optimizer_of)


def test_another_kind_is_refused_by_name(tmp_path):
    model, optimizer, scheduler = started(adamw, constant)
    update(0, model, optimizer, scheduler)
    checkpoint.save_optimizer(tmp_path, optimizer, scheduler, model)
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(CheckpointError, match=r"torch\.AdamW and this run has torch\.SGD.*--optim"):
        checkpoint.load_optimizer(tmp_path, sgd, constant(sgd), model)
    steps = schedulers.StepLR(optimizer, 2)
    with pytest.raises(CheckpointError, match=r"LambdaLR.*StepLR.*--lr_scheduler_type"):
        checkpoint.load_optimizer(tmp_path, optimizer, steps, model)


@pytest.mark.parametrize("name", ["LambdaLR", "MultiStepLR", "SequentialLR", "ChainedScheduler"])
def test_checkpoints_of_format_1_are_read(tmp_path, name):
    """They were plain JSON: no kinds, and integer keys as text."""
    model, optimizer, scheduler = started(adamw, TORCH_SCHEDULERS[name])
    update(0, model, optimizer, scheduler)
    checkpoint.save_optimizer(tmp_path, optimizer, scheduler, model)
    path = tmp_path / "optimizer.json"
    rest = json.loads(path.read_text())
    del rest["optimizer"], rest["scheduler_kind"]
    (group,) = rest["param_groups"]
    group["betas"] = group["betas"]["$tuple"]
    rest["scheduler"] = json.loads(json.dumps(scheduler.state_dict()))
    path.write_text(json.dumps(rest))
    resumed, again, schedule = started(adamw, TORCH_SCHEDULERS[name])
    resumed.load_state_dict(model.state_dict())
    checkpoint.load_optimizer(tmp_path, again, schedule, resumed)
    for step in range(1, STEPS):
        assert update(step, resumed, again, schedule) == update(step, model, optimizer, scheduler)
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    with pytest.raises(CheckpointError, match=r"another optimizer, without dampening.*--optim"):
        checkpoint.load_optimizer(tmp_path, sgd, constant(sgd), model)

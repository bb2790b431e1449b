"""Moments by parameter name, generators, no pickle: what a resumed run needs beside its weights."""

import json
import pickletools
import random
import resource

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn

from fastdpo.trainer import checkpoint
from fastdpo.trainer.checkpoint import CheckpointError


class Model(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(5, width)
        self.second = nn.Linear(width, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adamw(model, reverse=False, betas=(0.9, 0.95)):
    """Two groups, as Trainer makes them; in reverse, groups and parameters run backwards."""
    parameters = dict(model.named_parameters())
    decayed = [p for name, p in parameters.items() if "weight" in name]
    others = [p for name, p in parameters.items() if "bias" in name]
    groups = [
        {"params": decayed, "weight_decay": 0.1, "lr": 1e-2},
        {"params": others, "weight_decay": 0.0, "lr": 3e-2},
    ]
    if reverse:
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
    return torch.optim.AdamW(groups, betas=betas)


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def load(folder, optimizer, model):
    checkpoint.load_optimizer(folder, optimizer, constant(optimizer), model)


def train(model, optimizer, updates, seed):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=draw)).square().sum().backward()
        optimizer.step()


def trained(**options):
    torch.manual_seed(0)
    model = Model()
    optimizer = adamw(model, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, 3, seed=1)
    schedule.step()
    return model, optimizer, schedule


def moments(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]} {key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def assert_bitwise(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), f"{name} differs"


@pytest.mark.parametrize("reverse", [False, True])
def test_optimizer_state_by_name(tmp_path, reverse):
    model, optimizer, schedule = trained()
    checkpoint.save_optimizer(tmp_path, optimizer, schedule, model)
    resumed = Model()
    resumed.load_state_dict(model.state_dict())
    other = adamw(resumed, reverse=reverse, betas=(0.5, 0.5))
    other_schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1 / (1 + step))
    checkpoint.load_optimizer(tmp_path, other, other_schedule, resumed)

    saved = moments(model, optimizer)
    assert len(saved) == 4 * 3
    assert len({str(value.tolist()) for value in saved.values()}) > 8, "moments are all alike"
    assert_bitwise(moments(resumed, other), saved)
    by_decay = {group["weight_decay"]: group for group in other.param_groups}
    for group in optimizer.param_groups:
        twin = by_decay[group["weight_decay"]]
        assert twin["lr"] == group["lr"]
        assert tuple(twin["betas"]) == (0.9, 0.95)
        assert {p.shape for p in twin["params"]} == {p.shape for p in group["params"]}
    assert other_schedule.last_epoch == schedule.last_epoch == 1

    train(model, optimizer, 2, seed=2)
    train(resumed, other, 2, seed=2)
    assert_bitwise(dict(resumed.named_parameters()), dict(model.named_parameters()))


def test_optimizer_before_its_first_update(tmp_path):
    model = Model()
    first = adamw(model)
    checkpoint.save_optimizer(tmp_path, first, constant(first), model)
    optimizer = adamw(model)
    checkpoint.load_optimizer(tmp_path, optimizer, constant(optimizer), model)
    assert not optimizer.state


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW"])
def test_bitsandbytes_moments(tmp_path, kind):
    """Its state_dict() nests the moments, and all parameters share one code book."""
    model = Model()
    optimizer = getattr(bnb.optim, kind)(model.parameters(), lr=1e-2)
    book = torch.linspace(-1, 1, 256)
    for seed, parameter in enumerate(model.parameters()):
        draw = torch.Generator().manual_seed(seed)
        size = tuple(parameter.shape)
        optimizer.state[parameter] = {"step": 3 + seed, "qmap1": book, "absmax1": torch.rand(1)}
        optimizer.state[parameter]["state1"] = (
            torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
            if kind == "AdamW8bit"
            else torch.randn(size, generator=draw)
        )
    checkpoint.save_optimizer(tmp_path, optimizer, constant(optimizer), model)
    other = getattr(bnb.optim, kind)(model.parameters(), lr=1e-2)
    checkpoint.load_optimizer(tmp_path, other, constant(other), model)
    for parameter in model.parameters():
        saved, found = optimizer.state[parameter], other.state[parameter]
        assert saved["step"] == found["step"]
        assert_bitwise(
            {k: v for k, v in found.items() if k != "step"},
            {k: v for k, v in saved.items() if k != "step"},
        )


def test_other_parameters_are_refused(tmp_path):
    model, optimizer, schedule = trained()
    checkpoint.save_optimizer(tmp_path, optimizer, schedule, model)
    wider = Model(width=7)
    with pytest.raises(CheckpointError, match=r"first\.weight: \[6, 5\] there, \[7, 5\] here"):
        load(tmp_path, adamw(wider), wider)
    fewer = torch.optim.AdamW(model.first.parameters())
    with pytest.raises(CheckpointError, match=r"second\.bias: \[3\] there, none here"):
        load(tmp_path, fewer, model)
    one_group = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="no group of exactly the 4 parameters"):
        load(tmp_path, one_group, model)
    assert not one_group.state


def test_a_full_disk_is_an_os_error(tmp_path):
    model, optimizer, _ = trained()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OSError, match=r"optimizer\.safetensors"):
            checkpoint.save_optimizer(tmp_path, optimizer, constant(optimizer), model)
        with pytest.raises(OSError, match=r"rng_state\.safetensors"):
            checkpoint.save_rng_state(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Random numbers


def draws():
    return (
        [random.random() for _ in range(700)],  # past the end of the twister's 624 numbers
        random.gauss(0, 1),
        np.random.standard_normal(701).tolist(),
        np.random.randint(0, 2**31, 700).tolist(),
        torch.rand(700).tolist(),
        torch.randn(3).tolist(),
    )


def test_rng_states_go_on_where_they_were(tmp_path):
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        random.gauss(0, 1)  # each generator keeps the second of two
        np.random.standard_normal(1)
        torch.randn(1)
        checkpoint.save_rng_state(tmp_path)
        wanted = draws()
        assert draws() != wanted
        checkpoint.load_rng_state(tmp_path)
        assert draws() == wanted


def test_no_pickle(tmp_path):
    model, optimizer, schedule = trained()
    checkpoint.save_optimizer(tmp_path, optimizer, schedule, model)
    checkpoint.save_rng_state(tmp_path)
    checkpoint.write_manifest(tmp_path, {"seed": 1})
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(paths) == 5
    for path in paths:
        assert path.suffix in (".json", ".safetensors"), path
        content = path.read_bytes()
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))
        with pytest.raises((ValueError, UnicodeDecodeError, IndexError)):
            list(pickletools.genops(content))
        if path.suffix == ".json":
            json.loads(content)
        else:
            header = int.from_bytes(content[:8], "little")
            json.loads(content[8 : 8 + header])

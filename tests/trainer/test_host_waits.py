"""How often the host waits for the device in an update: operations whose result it must see."""

import copy
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fastdpo.modeling.logprobs import METRIC_OUTPUTS
from fastdpo.trainer.nonfinite import nonfinite_reason
from tests.tiny_trainer import tiny_base, tiny_trainer


class HostWaits(TorchDispatchMode):
    """Counts what makes the host wait on a GPU: single values, and results of unknown size."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [t for t in indices if t is not None and t.dtype in (torch.bool, torch.uint8)]
        of_unknown_size = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in self.NAMES or masks or of_unknown_size:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", ["eager", "fused"])
@pytest.mark.parametrize("outputs", [(), METRIC_OUTPUTS])
def test_an_update_is_read_once_at_its_end(tmp_path, monkeypatch, outputs, kernels):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    trainer = tiny_trainer(
        copy.deepcopy(tiny_base()), tmp_path / "out", micro_batch_tokens=512, kernels=kernels
    )
    trainer.on_before_train()
    # On the CPU alone the ids are looked at.
    module = sys.modules["fastdpo_kernels.linear_logprobs"]
    monkeypatch.setattr(module, "_validate_range", lambda *_: None)
    trainer.record.first_update_margin = 0.0  # of the first update alone its margin is read
    groups = [trainer.train_groups[i] for i in range(8)]
    trainer.policy.train()
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t) or tolist(t))
    with HostWaits() as waits:
        result = trainer.update.run(groups, outputs)
        assert not reads
        assert not nonfinite_reason(trainer.update.parameters, result, groups)
        trainer.record.add(groups, result, 0.1)
    assert len(reads) == 1
    assert waits.seen == []
    trainer.record.flush()
    assert len(reads) == 2  # all metrics of a log line together


def test_a_run_reads_once_an_update(tmp_path, monkeypatch):
    """transformers' loop included: its clipping, its sums and its bookkeeping."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    trainer = tiny_trainer(copy.deepcopy(tiny_base()), tmp_path / "out", max_steps=4,
                           logging_steps=4, max_grad_norm=1.0)  # fmt: skip
    module = sys.modules["fastdpo_kernels.linear_logprobs"]
    monkeypatch.setattr(module, "_validate_range", lambda *_: None)
    reads, walks = [], []
    tolist, counted = torch.Tensor.tolist, PreTrainedModel.num_parameters
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda t: reads.append(trainer.state.global_step) or tolist(t)
    )
    monkeypatch.setattr(
        PreTrainedModel, "num_parameters", lambda *a, **k: walks.append(1) or counted(*a, **k)
    )

    class InUpdates(HostWaits):
        def __torch_dispatch__(self, *args, **kwargs):
            before = len(self.seen)
            result = super().__torch_dispatch__(*args, **kwargs)
            if not 1 <= trainer.state.global_step < 4:  # the first update, and the log line's
                del self.seen[before:]
            return result

    with InUpdates() as waits:
        trainer.train()
    assert waits.seen == []
    assert [reads.count(step) for step in (1, 2, 3)] == [1, 1, 1]
    assert len(walks) == 1


def test_the_count_sees_what_it_is_for():
    tensor = torch.arange(4.0)
    with HostWaits() as waits:
        tensor.sum().item()
        tensor[tensor > 1]
        bool(tensor.any())
        tensor.nonzero()
        tensor.repeat_interleave(torch.tensor([1, 2, 3, 4]))
    assert len(waits.seen) >= 5

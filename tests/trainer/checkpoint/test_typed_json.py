"""What JSON does not have comes back as it was, and what nothing can keep is refused by name."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from fastdpo.trainer.checkpoint import CheckpointError
from fastdpo.trainer.checkpoint.typed_json import decode, encode

VALUES = {
    "plain": {"a": [1, 2.5, None, True, "text"], "b": {"c": {}}},
    "infinities": [math.inf, -math.inf],
    "integer keys": {1: "one", 2: {3: 4.0}},
    "counter": Counter({1: 2, 30: 1}),
    "a key like a mark": {"$float": "inf"},
    "one key like a mark inside": {"x": {"$tensor": 1}},
    "tuples": {"betas": (0.9, 0.95), "nested": [(1, (2,))]},
    "set": {"warned": {1, 2}},
    "numpy": [np.float32(0.1), np.int64(7), np.bool_(True)],
    "dtypes": [torch.bfloat16, torch.device("cpu")],
    "keys of other types": {(1, 2): "pair", None: 0, 1.5: math.inf},
}


def both_ways(value):
    tensors = {}
    text = json.dumps(encode(value, "value", tensors), allow_nan=False)
    return decode(json.loads(text), tensors)


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back(name):
    found = both_ways(VALUES[name])
    assert found == VALUES[name]
    assert repr(found) == repr(VALUES[name])


def test_nan_tensors_and_arrays_come_back():
    draw = torch.randn(3, dtype=torch.float64)
    found = both_ways({"nan": math.nan, "lr": torch.tensor(1e-2), "list": [draw, {5: draw[0]}]})
    assert math.isnan(found["nan"])
    assert torch.equal(found["lr"], torch.tensor(1e-2))
    assert torch.equal(found["list"][0], draw)
    assert torch.equal(found["list"][1][5], draw[0])
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(both_ways([array])[0], array)


def test_what_cannot_be_kept_is_named():
    with pytest.raises(CheckpointError, match=r"the scheduler\.a is a .*function.*--lr_sched"):
        encode({"a": [lambda step: step]}, "the scheduler", {})

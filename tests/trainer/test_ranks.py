"""Several processes share updates, and train what one process trains."""

import pytest
import torch

from tests.several_ranks import outputs, run_ranks
from tests.trainer.rank_cases import CASES, fail_in_memory, run_cases, save_base

GRADIENT, WEIGHTS = 1e-6, 1e-4
"""Of the norm: one update's gradient in fp32, and the weights after 20."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    return run_cases(CASES, base, tmp_path_factory.mktemp("alone"))


def group(count, base, folder, cases):
    found = run_ranks(count, run_cases, folder, cases, base, folder)
    assert not any(isinstance(each, int) for each in found), outputs(folder, count)
    return found


def apart(found, expected):
    """The norm of the difference, relative to that of what was expected."""
    assert found.keys() == expected.keys()
    difference = sum((found[n] - each).double().square().sum() for n, each in expected.items())
    whole = sum(each.double().square().sum() for each in expected.values())
    return float((difference / whole).sqrt())


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_train_what_one_process_trains(count, base, alone, tmp_path, soak):
    cases = CASES
    found = group(count, base, tmp_path, cases)
    for case in cases:
        one = alone[case.name]
        for rank, each in enumerate(outcome[case.name] for outcome in found):
            where = (case.name, rank)
            assert apart(each.gradient, one.gradient) <= GRADIENT, where
            assert each.without == one.without
            torch.testing.assert_close(each.result.loss, one.result.loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(each.result.logps, one.result.logps, rtol=1e-6, atol=0)
            print(where, apart(each.gradient, one.gradient), apart(each.weights, one.weights), each.traffic)
            assert apart(each.weights, one.weights) <= WEIGHTS, where

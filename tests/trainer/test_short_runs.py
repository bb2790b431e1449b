"""Runs that end before each pair was seen: the reference of the rest is not computed."""

import numpy as np
import pytest

from tests.tiny_trainer import tiny_base, tiny_trainer


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"max_steps": 2}, 16),
        ({"num_train_epochs": 0.5}, 24),  # 3 of 5 updates
        ({"max_steps": 5}, 35),
        ({"max_steps": 7}, 35),
        ({"dataloader_drop_last": True}, 35),
    ],
)
def test_the_reference_of_pairs_that_are_never_trained_on_is_not_computed(
    tmp_path, monkeypatch, caplog, options, pairs
):
    caplog.set_level("INFO")
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    trainer = tiny_trainer(tiny_base(), tmp_path / "out", **options)
    trainer.train()
    known = ~np.isnan(trainer.train_groups.ref_logps).any(axis=1)
    assert known.sum() == pairs
    assert (f"The run ends after {pairs} of 35 pairs" in caplog.text) == (pairs < 35)
    # A longer run computes what is missing, and the pairs of a loader of one's own are not known.
    whole = tiny_trainer(tiny_base(), tmp_path / "out", max_steps=5)
    sampled = whole.get_train_dataloader()
    monkeypatch.setattr(whole, "get_train_dataloader", lambda: sampled)
    whole.train()
    assert np.array_equal(
        whole.train_groups.ref_logps[known], trainer.train_groups.ref_logps[known]
    )
    assert not np.isnan(whole.train_groups.ref_logps).any()

"""Trackers without a network: tensorboard and trackio get every metric of a run.

Where neither is installed, stand-ins with the calls that transformers makes take their places.
"""

import importlib.util

import pytest

from tests.tiny_trainer import tiny_base, tiny_trainer

WRITER = """
import json, pathlib
class SummaryWriter:
    def __init__(self, log_dir):
        self.path = pathlib.Path(log_dir) / "scalars.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
    def add_scalar(self, name, value, step):
        with self.path.open("a") as file:
            file.write(json.dumps([name, value, step]) + "\\n")
    def add_text(self, *_): pass
    def flush(self): pass
    def close(self): pass
"""
TRACKIO = """
import contextvars
calls, config = [], {}
class context_vars:
    current_space_id = contextvars.ContextVar("space", default=None)
def init(**options): calls.append(("init", options))
def log(metrics, **_): calls.append(("log", metrics))
def finish(): calls.append(("finish", {}))
config = type("Config", (dict,), {"update": lambda self, new, **_: dict.update(self, new)})()
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages, first on the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    return folder


def run(folder, tracker):
    trainer = tiny_trainer(
        tiny_base(), folder / "out", report_to=tracker, eval_strategy="epoch", ref_cache="off"
    )
    trainer.train()
    return trainer


METRICS = {"train/loss", "train/rewards/margins", "train/rewards/accuracies",
           "train/logratios/chosen_per_token", "eval/rewards/margins"}  # fmt: skip


def test_tensorboard_gets_every_metric(tmp_path, site):
    if importlib.util.find_spec("tensorboard") is None:
        (site / "tensorboardX.py").write_text(WRITER)
        importlib.invalidate_caches()
        run(tmp_path, "tensorboard")
        written = (tmp_path / "board" / "scalars.jsonl").read_text()
        assert {line.split('"')[1] for line in written.splitlines()} >= METRICS
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run(tmp_path, "tensorboard")
        events = EventAccumulator(str(tmp_path / "board"))
        events.Reload()
        assert set(events.Tags()["scalars"]) >= METRICS


def test_trackio_gets_every_metric(tmp_path, site):
    if importlib.util.find_spec("trackio") is not None:
        pytest.skip("trackio is installed, and its own database would be written into")
    (site / "trackio.py").write_text(TRACKIO)
    importlib.invalidate_caches()
    run(tmp_path, "trackio")
    import trackio

    kinds = [kind for kind, _ in trackio.calls]
    assert kinds[0] == "init"
    assert trackio.calls[0][1]["space_id"] is None  # nothing leaves the machine
    logged = set().union(*(metrics for kind, metrics in trackio.calls if kind == "log"))
    assert logged >= METRICS

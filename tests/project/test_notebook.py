"""The walkthrough notebook runs from its first cell to its last, and was saved from such a run."""

import base64
import contextlib
import io
import json
import logging
import re
import shutil
import struct
import warnings
from pathlib import Path

import pytest

from tests.taught_llama import RECIPE, taught_llama

nbformat = pytest.importorskip("nbformat", reason="needs fastdpo[dev]")
nbclient = pytest.importorskip("nbclient", reason="needs fastdpo[dev]")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "walkthrough.ipynb"
PLOTS = 5


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs_of(notebook):
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def said_by(notebook):
    """What cells printed, without warnings and progress bars."""
    return "".join(out.text for out in outputs_of(notebook) if out.get("name") == "stdout")


def plots_of(notebook):
    return [
        base64.b64decode(out.data["image/png"])
        for out in outputs_of(notebook)
        if "image/png" in out.get("data", {})
    ]


def metric_in(text, name):
    """The last number of the line that begins with a metric's name."""
    return float(re.search(rf"^{name} .*?(-?[\d.]+)$", text, re.MULTILINE)[1])


def run_in_a_kernel(place):
    """What a run in a Jupyter kernel of its own prints, and how many plots it shows."""
    notebook = read()
    resources = {"metadata": {"path": str(place)}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    ).execute()
    return said_by(notebook), len(plots_of(notebook))


def run_here(place, monkeypatch):
    """The same of its cells in this process, which has imported everything already."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs fastdpo[dev]")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(place)
    names, said = {}, io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("fastdpo").addHandler(handler)
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings(), pyplot.rc_context():
            for cell in read().cells:
                if cell.cell_type == "code":
                    exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
        return said.getvalue(), len(pyplot.get_fignums())
    finally:
        logging.getLogger("fastdpo").removeHandler(handler)
        pyplot.close("all")


def test_it_runs_and_shows_what_its_text_says(tmp_path, soak, monkeypatch):
    """With --soak in a kernel, else in this process; the demo lies there already."""
    demo = taught_llama().model_dir.parent
    folder = tmp_path / "fastdpo-output" / "walkthrough"
    shutil.copytree(demo, folder / "demo")
    said, plots = run_in_a_kernel(tmp_path) if soak else run_here(tmp_path, monkeypatch)
    assert "Demo: reusing the model" in said, "its recipe is not that of taught_llama.py"
    assert "Largest margin of the first update: 0.0 nats" in said
    assert metric_in(said, "preference accuracy") > 0.9
    metrics = (folder / "adapter" / "metrics.jsonl").read_text()
    log = [json.loads(line) for line in metrics.splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=0.01)
    assert losses[-1] < 0.5
    assert "likelihood displacement" in said, "the run that goes too far is not noticed"
    broken = re.search(r"^perplexity of chosen +([\d.]+) +([\d.]+)$", said, re.MULTILINE)
    assert float(broken[2]) > 2 * float(broken[1])
    assert plots == PLOTS


def test_it_was_saved_from_a_run():
    notebook = read()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert metric_in(said_by(notebook), "preference accuracy") > 0.9
    plots = plots_of(notebook)
    assert len(plots) == PLOTS
    for plot in plots:
        width, height = struct.unpack(">II", plot[16:24])  # of a PNG's header
        assert width >= 400
        assert height >= 300


def test_it_was_saved_without_noise():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 600_000
    assert not re.search(r"/(tmp|home|root|work|Users)/", text), "a path of one machine"
    assert "ERROR" not in text
    assert not [out for out in outputs_of(read()) if out.get("name") == "stderr"]
    for name, value in (("updates", RECIPE.updates), ("train_pairs", RECIPE.train_pairs)):
        assert f"{name}={value}" in text

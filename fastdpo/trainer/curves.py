"""The curves of a run as a PNG, where matplotlib is installed."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.system import files

CURVES_FILE = "curves.png"
PANELS = {
    "loss (nats)": ("loss",),
    "reward margin (beta x nats)": ("rewards/margins",),
    "preference accuracy": ("rewards/accuracies",),
    "log-ratio per token (nats)": ("logratios/chosen_per_token", "logratios/rejected_per_token"),
}
"""Title of each panel, and the logged names of its curves."""

_COLORS = ("#1b6ca8", "#d1495b")


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw loss, margin, accuracy and log-ratios against updates, held-out points on top.

    Args:
        history: the logs of a run, each with `step`; those of evaluations have names with `eval_`.
        path: the PNG that is written.

    Returns:
        Whether it was drawn: matplotlib is installed, and two logs at least have a loss.
    """
    try:
        from matplotlib.figure import Figure as Sheet
    except ImportError:
        return False
    if sum("loss" in line for line in history) < 2:
        return False
    sheet = Sheet((10, 6), layout="constrained")
    for axes, (title, names) in zip(sheet.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name, color in zip(names, _COLORS, strict=False):
            label = name.partition("/")[2].removesuffix("_per_token") if len(names) > 1 else "train"
            axes.plot(*_points(history, name), color=color, label=label)
            steps, values = _points(history, f"eval_{name}")
            if steps:
                held_out = "held out" if len(names) == 1 else f"{label}, held out"
                axes.plot(steps, values, "o", color=_COLORS[-1] if len(names) == 1 else color,
                          markeredgecolor="black", label=held_out)  # fmt: skip
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("update")
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    drawn = io.BytesIO()
    sheet.savefig(drawn, format="png", dpi=100, metadata={"Software": None})
    files.write_bytes(path, drawn.getvalue())
    return True


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The logs of the run that wrote a folder, from its metrics.jsonl; none without one."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # cut by a kill
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def _points(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = [(line["step"], line[name]) for line in history if name in line]
    return [step for step, _ in found], [value for _, value in found]

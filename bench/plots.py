"""The plots of RESULTS.md, drawn from rows; a plot without rows is not drawn."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import MEASURED, Row
from bench.heads import BARE_GEMMS

COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#555555", "#00798c", "#a0522d")
SIZE_INCHES = (8.5, 4.8)


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every plot that the rows of one machine allow."""
    measured = _taken_together([row for row in rows if row.outcome == MEASURED])
    drawings = {
        "memory.png": memory_against_length,
        "longest_pair.png": longest_by_card,
        "throughput.png": throughput,
        "kernel.png": kernel_times,
        "tokens.png": tokens_run,
        "curve.png": learning_curve,
    }
    written = []
    for name, draw in drawings.items():
        figure = draw(measured)
        if figure is not None:
            path = folder / name
            figure.savefig(path, dpi=110, metadata={"Software": None})
            written.append(path)
    return written


def _taken_together(rows: Sequence[Row]) -> list[Row]:
    """Without what was not measured in the run of our own latest row of the case.

    Bars of different runs, one on a busy machine perhaps, must not stand side by side.
    """
    runs = {_case_key(row): row.run for row in rows if row.contender == "fastdpo"}
    return [row for row in rows if runs.get(_case_key(row), row.run) == row.run]


def _case_key(row: Row) -> str:
    return row.question + json.dumps(dict(row.case), sort_keys=True)


def memory_against_length(rows: Sequence[Row]) -> Any:
    """Peak memory of an update against the length of its pairs."""
    return _lines(
        [r for r in rows if r.metric == "peak_mib" and "pair_tokens" in r.case],
        "pair_tokens",
        "tokens of a pair (prompt + chosen + rejected)",
        "peak memory over the built trainer (MiB)",
        "Peak memory of one update",
    )


def longest_by_card(rows: Sequence[Row]) -> Any:
    """The longest pair against the memory it may take."""
    return _lines(
        [r for r in rows if r.metric == "longest_pair_tokens"],
        "card_gib",
        "memory (GiB): the card's on CUDA, above the built trainer on the CPU",
        "longest pair (tokens)",
        "The longest pair that one update takes",
    )


def throughput(rows: Sequence[Row]) -> Any:
    """Tokens a second of every trainer in every case."""
    return _bars(
        [r for r in rows if r.metric == "useful_tokens_per_s"],
        "tokens a second, a pair's shared tokens counted once",
        "Throughput of an update (p50; whiskers p20 to p80)",
    )


def tokens_run(rows: Sequence[Row]) -> Any:
    """Tokens that went through the model for one update: what sharing and packing save."""
    return _bars(
        [r for r in rows if r.metric == "run_tokens"],
        "tokens through the model in one update",
        "Tokens run an update: padding, repeated prompts and reference passes included",
    )


def kernel_times(rows: Sequence[Row]) -> Any:
    """Time of the head op over that of its bare matrix products."""
    times = [r for r in rows if r.question == "kernel" and r.metric == "time_ms"]
    bare = {_case_label(r): r.p50 for r in times if r.contender == BARE_GEMMS}
    return _bars(
        [r for r in times if r.contender != BARE_GEMMS and _case_label(r) in bare],
        "time / time of the bare matrix products (log)",
        "Head op: forward and backward over the bare GEMMs (1 = nothing else done)",
        scale=lambda row: 1.0 / bare[_case_label(row)],
        log=True,
    )


def learning_curve(rows: Sequence[Row]) -> Any:
    """Loss against updates."""
    curves = [r for r in rows if r.metric == "loss_nat"]
    if not curves:
        return None
    figure, axes = _axes("update", "loss (nat)", "Learning curve beside TRL's, same pairs")
    styles = ("-", "--")
    for number, row in enumerate(curves):
        ours = row.contender == "fastdpo"
        label = f"{row.contender}, {row.case['tuning']}"
        axes.plot(
            range(1, len(row.samples) + 1), row.samples, styles[not ours],
            color=COLOURS[number % len(COLOURS)], label=label, linewidth=3.5 if ours else 1.6,
        )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return figure


def _lines(rows: Sequence[Row], x: str, x_label: str, y_label: str, title: str) -> Any:
    """p50 against a field of the case, a line a contender, both axes logarithmic."""
    if len({row.case[x] for row in rows}) < 2:
        return None
    figure, axes = _axes(x_label, y_label, title)
    for number, contender in enumerate(_distinct(row.contender for row in rows)):
        points = sorted((row.case[x], row.p50) for row in rows if row.contender == contender)
        axes.plot(*zip(*points, strict=True), "o-", label=contender, color=COLOURS[number])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(
            lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
        )
    axes.set_xticks(sorted({row.case[x] for row in rows}))
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def _bars(
    rows: Sequence[Row], y_label: str, title: str, scale: Any = lambda row: 1.0, log: bool = False
) -> Any:
    """A group of bars a case, a bar a contender, whiskers from p20 to p80."""
    if not rows:
        return None
    figure, axes = _axes("", y_label, title)
    cases = _distinct(_case_label(row) for row in rows)
    contenders = _distinct(row.contender for row in rows)
    width = 0.85 / len(contenders)
    shown = {(row.contender, _case_label(row)) for row in rows}
    for number, contender in enumerate(contenders):
        mine = {_case_label(row): row for row in rows if row.contender == contender}
        for place, case in enumerate(cases):
            if case not in mine:
                continue
            low, middle, high = (scale(mine[case]) * value for value in mine[case].quantiles)
            present = [name for name in contenders if (name, case) in shown]
            at = place + (present.index(contender) - (len(present) - 1) / 2) * width
            axes.bar(
                at, middle, width * 0.94, color=COLOURS[number % len(COLOURS)],
                yerr=[[middle - low], [high - middle]], capsize=2,
                label=contender if case == next(iter(mine)) else None,
            )  # fmt: skip
            axes.annotate(
                f"{middle:,.3g}" if middle < 1000 else f"{middle:,.0f}", (at, high), (0, 3),
                textcoords="offset points", ha="center", fontsize=7,
                rotation=90 if len(cases) * len(contenders) > 24 else 0,
            )  # fmt: skip
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(0.8, axes.get_ylim()[0]))
        axes.axhline(1.0, color="#999999", linewidth=1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if 1 < value < 10 else "")
    axes.margins(y=0.16)
    figure.legend(loc="outside lower center", ncols=min(4, len(contenders)), frameon=False)
    return figure


def _axes(x_label: str, y_label: str, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _case_label(row: Row) -> str:
    """The case in two or three short lines."""
    case = row.case
    if row.question == "kernel":
        sizes = f"N={case['tokens']} H={case['hidden']}\nV={case['vocabulary']}"
        return f"{case['work']}, {case['kind']}\n{sizes}"
    lines = [f"{case['tuning']}, checkpoints {'on' if case['checkpointing'] else 'off'}"]
    threads = (
        f", {case['threads']} thread{'s' * (case['threads'] > 1)}" if "threads" in case else ""
    )
    return "\n".join([*lines, f"{case['model']}{threads}"])


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))

"""What a merge keeps of the margin that an adapter learned: by dtype, rounding and base.

Asked of a real model and an adapter of it, `--model FOLDER --adapter FOLDER`, on held-out pairs.
Samples of `margin_nat` and `accuracy_relative` are one figure; `unchanged_relative` is the share of
updated weights that the written file has as the base had them. The contender "adapter" is the
adapter, not merged, on the base that it was trained on.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.harness import Recorder
from bench.real import content_name, held_out_rows

PAIRS = 48
DTYPES = ("bfloat16", "float16", "float32")
TOLD = ("learning_rate", "max_steps", "per_device_train_batch_size", "beta")


def main(
    recorder: Recorder, *, quick: bool, model: Path | None = None, adapter: Path | None = None
) -> None:
    """Every dtype; without `model` and `adapter` there is nothing to ask."""
    if model is None or adapter is None:
        print("merged: asked with --model FOLDER and --adapter FOLDER alone")
        return
    told = json.loads((adapter / "training_args.json").read_text())
    qlora = bool(told.get("base_in_4bit", False))
    case = {
        "model": content_name(model), "tuning": "qlora" if qlora else "lora", "pairs": PAIRS,
        **{name: told[name] for name in TOLD},
    }  # fmt: skip
    for dtype in DTYPES[: 1 if quick else None]:
        reports = [_merge(model, adapter, dtype, "bf16", qlora=qlora)]
        if qlora and dtype == DTYPES[0]:
            reports.append(_merge(model, adapter, dtype, "dequantized", qlora=qlora))
        report = reports[0]
        if dtype == DTYPES[0]:
            _add(recorder, case, "adapter", report["learned"])
            if report["on_whole_base"] is not None:
                _add(recorder, case, "adapter on the whole base", report["on_whole_base"])
        kept_by_way = {way: kept for each in reports for way, kept in each["kept"].items()}
        roundings = {way: each for report in reports for way, each in report["roundings"].items()}
        for way, kept in kept_by_way.items():
            onto, rounding = way.split()
            counts = roundings[way]
            rounding = rounding if counts["weights"] else "none"
            merged = {**case, "dtype": dtype, "onto": onto, "rounding": rounding}
            _add(recorder, merged, "fastdpo", kept)
            if counts["weights"]:
                unchanged = counts["unchanged_written"] / counts["weights"]
                recorder.add(merged, "fastdpo", "unchanged_relative", [unchanged])


def _add(recorder: Recorder, case: dict[str, Any], contender: str, kept: dict[str, float]) -> None:
    recorder.add(case, contender, "margin_nat", [kept["margin"]])
    recorder.add(case, contender, "accuracy_relative", [kept["accuracy"]])


def _merge(model: Path, adapter: Path, dtype: str, onto: str, *, qlora: bool) -> dict[str, Any]:
    """The report of a merge into a folder that is thrown away."""
    from fastdpo.merge import main as merge

    with TemporaryDirectory() as folder:
        pairs = Path(folder, "held_out.jsonl")
        lines = [json.dumps(row) + "\n" for row in held_out_rows()[:PAIRS]]
        pairs.write_text("".join(lines), encoding="utf-8")
        merge(
            ["--model", str(model), "--adapter", str(adapter), "--dataset", str(pairs)]
            + ["--output_dir", f"{folder}/merged", "--dtype", dtype, "--report_pairs", str(PAIRS)]
            + ["--onto", onto]
            + (["--qlora"] if qlora else [])
        )
        return json.loads(Path(folder, "merged", "merge.json").read_text())["report"]


if __name__ == "__main__":
    from bench.command import run

    run("merged")

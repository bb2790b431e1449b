"""The kernels of a layer's ops compile for every GPU: no spills, accesses of 16 bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed on Linux only")

SHARED_BYTES = 101_376
"""Of the smallest GPUs; no kernel of these needs more than a few KiB."""

OPERANDS_OF_ONE_ROW = 16
"""Most narrower accesses: weights, angles and numbers a row, not the tensors themselves."""


def test_kernels_compile_without_spills_and_with_wide_accesses(soak):
    """Each kernel once in bf16; with --soak every form and width for every GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("layer_ops_compile.py")
    run = subprocess.run(
        [sys.executable, str(script), *([] if soak else ["--one"])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert {row["capability"] for row in rows} == {80, 86, 89, 90, 100, 120}
    assert len({row["kernel"] for row in rows}) == (7 if soak else 6)
    for row in rows:
        assert row["stack_bytes"] == 0, f"spills: {row}"
        assert row["shared_bytes"] <= SHARED_BYTES, row
        narrow = row["accesses"] - row["wide"]
        assert row["wide"] >= 3, f"no wide accesses: {row}"
        assert narrow <= (0 if "gated" in row["kernel"] else OPERANDS_OF_ONE_ROW), row

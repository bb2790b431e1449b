"""Every launch configuration compiles for its GPU, without spills, inside its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed on Linux only")


def test_configurations_compile_for_every_card(soak):
    """The training kernels in bf16; with --soak every kernel in every variant and dtype."""
    options = [] if soak else ["--one"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    run = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == (84 if soak else 12)
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["stack_bytes"] == 0, f"spills: {row}"
        if row["operand"] == "bf16" and row["kernel"] != "combine_kernel":
            assert row["tensor_core"], f"no tensor-core instruction: {row}"

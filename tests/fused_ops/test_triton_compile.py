"""What a call launches compiles for every GPU: no spills, wide loads, inside shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GEMMS = ("logits_kernel", "gradient_kernel")

pytest.importorskip("triton", reason="Triton is installed on Linux only")


def test_calls_compile_for_every_card(soak):
    """Both GEMMs in bf16, all kernels on sm_90; with --soak every option, dtype and odd shape."""
    options = ["--soak"] if soak else []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    run = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {"target_kernel", "combine_kernel", "rescale_kernel", "finish_kernel"}
    gemms = {(row["kernel"], row["capability"]) for row in rows if row["kernel"] in GEMMS}
    assert len(gemms) == 12
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["stack_bytes"] == 0, f"spills: {row}"
        if row["kernel"] in GEMMS and "float32" not in row["case"].get("dtype", ""):
            assert row["tensor_core"], f"no tensor-core instruction: {row}"
            if row["case"].get("hidden") != "1000":
                assert row["two_byte_loads_in_loops"] == 0, f"loads two bytes at a time: {row}"

"""Launches and bytes of a layer, as `bench.layers` counts them without a GPU."""

import os
import subprocess
import sys

import pytest

from bench.harness import read

KINDS = ("other_bytes", "NF4_bytes")
"""Bytes outside the products and the attention."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """In a process without the interpreter, which would run the kernels."""
    path = tmp_path_factory.mktemp("layers") / "rows.jsonl"
    words = ["bench.layers", "--part", "operations", "--results", str(path)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-m", *words], env=environment, check=True, capture_output=True)
    return {(row.case["model"], row.contender, row.metric): row.samples[0] for row in read(path)}


@pytest.mark.parametrize("alias", ["llama-3.1-8b", "qwen3-8b"])
def test_a_fused_layer_launches_and_moves_and_saves_less(counted, alias):
    def value(kernels, metric):
        return counted[alias, kernels, metric]

    assert value("fused", "launches_count") <= 200 < value("eager", "launches_count")
    outside = {k: sum(value(k, kind) for kind in KINDS) for k in ("eager", "fused")}
    assert 3 * outside["fused"] <= outside["eager"]
    saved = "saved_when_kept_bytes"
    assert 3 * value("fused", saved) <= 2 * value("eager", saved)
    assert value("fused", "attention_bytes") == value("eager", "attention_bytes")

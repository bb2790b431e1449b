"""bench.static: machine code is read rightly, and what must not come back into the GEMM loops."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed on Linux only")

from bench import harness
from bench.estimate import (
    CARDS,
    Tile,
    ctas_per_sm,
    launch_seconds,
    products_per_pass,
    tile_of,
    waves_of,
)
from bench.launches import Compiled, Launch, pretended
from bench.machine_code import MachineCode, instructions_of, loops_of, main_loop
from bench.static import RAGGED_HIDDEN

ROOT = Path(__file__).resolve().parents[2]

NESTED = """
        /*0000*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;   /* 0x0 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R41], desc[UR14][R8.64], P0 ;
        /*0020*/              @!PT LDS RZ, [RZ] ;
        /*0030*/                   DEPBAR.LE SB0, 0x2 ;
        /*0040*/                   LDG.E.U16 R9, desc[UR4][R4.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R19+0x1000], desc[UR14][R8.64], !P0 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0090*/              @!P1 BRA 0x30 ;
        /*00a0*/                   FADD R1, R1, R2 ;
        /*00b0*/               @P2 BRA 0x10 ;
        /*00c0*/                   BRA 0xc0 ;
"""


def test_loops_of_machine_code_are_read():
    instructions = instructions_of(NESTED)
    assert len(instructions) == 13
    loops = loops_of(instructions)
    assert [len(loop.instructions) for loop in loops] == [7, 11], "the last branch is to itself"
    loop = main_loop(loops)
    assert loop is not None
    assert len(loop.instructions) == 7, "the inner one"
    assert loop.by_kind()["HGMMA"] == 2
    assert (loop.copies, loop.narrow_loads, loop.copy_groups_in_flight) == (1, 1, 2)
    assert (loop.mma_waits, loop.mma_operands_in_registers) == ((1,), 1)
    assert main_loop(loops_of(instructions[:5])) is None
    annotated = NESTED.replace("BRA 0x30 ;", "BRA 0x30   &req={1}  ?WAIT15_END_GROUP;")
    assert loops_of(instructions_of(annotated))[0].mmas == loop.mmas, "as for sm_120 in CUDA 12.8"


def test_tile_and_passes_come_from_the_kernel():
    text = """
    %c64_i32 = arith.constant 64 : i32 loc(#loc3)
    %c128_i32 = arith.constant 128 : i32 loc(#loc3)
    %c0_i32 = arith.constant 0 : i32 loc(#loc3)
    %a = scf.for %tile = %c0_i32 to %tiles step %c1_i32 iter_args(%b = %c) -> ()  : i32 {
      %d = scf.for %start = %c0_i32 to %c128_i32 step %c64_i32 iter_args(%e = %f) -> ()  : i32 {
        %g = tt.dot %h, %i, %j : tensor<128x64xbf16> * tensor<64x32xbf16> -> tensor<128x32xf32>
    """
    assert tile_of(text) == Tile(m=128, n=32, k=64, per_entry=2)
    assert tile_of(text.replace("%c128_i32 step", "%size step")) == Tile(128, 32, 64, None)
    assert tile_of("scf.for") is None
    h100 = CARDS[9, 0]
    assert h100.peak_flops_per_s == pytest.approx(989e12, rel=0.01), "as its data sheet has it"


def test_waves_and_time_of_a_launch():
    code = MachineCode(
        tuple(instructions_of(NESTED)), tuple(loops_of(instructions_of(NESTED))), 168, 0
    )
    dot = "scf.for\ntt.dot %a, %b, %c : tensor<128x64xbf16> * tensor<64x128xbf16> -> tensor"
    compiled = Compiled(code, 8, 3, 100_000, 0, dot)
    assert products_per_pass(code.main, tile_of(dot), 8) == pytest.approx(0.5), "2 of 64x128x16"
    card = CARDS[9, 0]
    assert ctas_per_sm(compiled, card) == 1, "by registers"
    assert ctas_per_sm(dataclasses.replace(compiled, warps=4), card) == 2, "by shared memory"
    launch = Launch("gemm", "", 200, {"rows": 128}, 0, {}, compiled)
    waves = waves_of([launch, launch], card)
    assert (waves.launches, waves.ctas, waves.waves, waves.slots) == (2, 400, 4, 132)
    assert waves.use == pytest.approx(400 / 528)
    flops = 200 * 1000 * tile_of(dot).flops  # 1,000 products each
    alone_s = launch_seconds(launch, flops, card)
    assert alone_s > flops / card.cublas_flops_per_s, "two loads of 2 bytes, two waves"
    half = dataclasses.replace(launch, grid=132)
    assert launch_seconds(half, flops * 132 / 200, card) == pytest.approx(alone_s / 2)


def test_nothing_is_compiled_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is 1"), pretended((9, 0), {}):
        pass


def compiled_rows(folder, *options):
    """Rows of `python -m bench.static`: in a process that compiles, of any cache independent."""
    path = folder / "static.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static", "--results", str(path), *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return harness.read(path)


def test_gemm_loops_stay_as_they_must(tmp_path, soak):
    """Training's kernels on two capabilities; with --soak all that a call can ask for, on all.

    That the kernels of the others neither spill nor load narrowly, test_triton_compile sees.
    """
    capabilities = [f"{major}.{minor}" for major, minor in CARDS] if soak else ["8.9", "9.0"]
    depth = "every" if soak else "quick"
    rows = compiled_rows(tmp_path, "--depth", depth, "--capability", *capabilities)
    kernels = {}
    for row in rows:
        if "work" not in row.case:
            key = (row.case["capability"], row.contender, row.case.get("sizes", ""))
            assert row.samples, f"{key} did not compile: {row.note}"
            kernels.setdefault(key, {})[row.metric] = row.p50
    assert {capability for capability, _, _ in kernels} == set(capabilities)
    for key, found in kernels.items():
        capability, _, sizes = key
        if f"H={RAGGED_HIDDEN}" in sizes:
            continue  # that it compiles is enough: no model has such an H
        assert found["stack_bytes"] == 0, f"{key} spills: {found}"
        if "mma_count" not in found:
            continue
        assert found["narrow_loads_count"] == 0, f"{key} loads 2 bytes at a time: {found}"
        assert found["copies_count"] > 0, f"{key} has no asynchronous copies: {found}"
        if capability == "9.0":
            assert found["mma_waits_count"] < found["mma_count"], f"{key} waits for every MMA"
            assert soak or found["mma_in_flight_count"] >= 1, f"{key} ends each pass with a wait"
    assert {key[0] for key, found in kernels.items() if "mma_count" in found} == {
        key[0] for key in kernels
    }, "every capability has a GEMM of ours"
    waves = [row for row in rows if row.metric == "waves_count"]
    assert waves
    assert {row.case["capability"] for row in waves} == {key[0] for key in kernels}
    assert all(row.p50 >= 1 for row in waves)
    told = {row.case["gpu"] for row in rows if row.metric == "estimated_ms"}
    assert told == {"H100", "RTX 4090"}

"""bench/: rows survive, nothing is overwritten, noise is told from change, and it all runs."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import compare, contest, gpu, harness, inputs, memory, rehearsal, report
from bench.harness import MEASURED, MISSING, Recorder, Row
from bench.measuring import PeakMemory, Stopwatch

ROOT = Path(__file__).parents[2]


def row(samples=(1.0, 1.1, 1.2), contender="fastdpo", metric="update_s", **more):
    fields = {
        "question": "step",
        "case": {"tuning": "lora", "checkpointing": False, "model": "tiny", "threads": 1},
        "contender": contender,
        "metric": metric,
        "samples": tuple(samples),
        "machine": {"name": "a machine"},
        "time_utc": "2026-01-01T00:00:00Z",
    }
    return Row(**fields | more)


def test_a_row_survives_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [row(of_roofline=0.5), row((), "trl", outcome=MISSING, note="not installed")]
    harness.append(rows, path)
    assert harness.read(path) == rows
    line = json.loads(path.read_text().splitlines()[0])
    assert line["p50"] == pytest.approx(1.1)
    assert line["id"] == rows[0].id


def test_rows_are_appended_and_a_changed_one_is_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    harness.append([row()], path)
    before = path.read_bytes()
    harness.append([row((2.0,))], path)
    assert path.read_bytes().startswith(before)
    assert [r.p50 for r in harness.latest(harness.read(path))] == [2.0]
    path.write_text(path.read_text().replace("1.2", "0.2", 1))
    with pytest.raises(ValueError, match=r"rows.jsonl:1 was changed"):
        harness.read(path)


def test_a_row_without_unit_or_sense_is_refused():
    with pytest.raises(ValueError, match="has no unit"):
        row(metric="speed")
    with pytest.raises(ValueError, match="does not fit"):
        row(())
    with pytest.raises(ValueError, match="does not fit"):
        row(outcome=MISSING)


def test_a_recorder_writes_where_and_with_what(tmp_path):
    recorder = Recorder("step", tmp_path / "rows.jsonl")
    recorder.add({"pairs": 2}, "fastdpo", "update_s", [0.25])
    (found,) = harness.read(tmp_path / "rows.jsonl")
    assert found.machine["name"]
    assert found.versions["torch"] == torch.__version__.replace("+cpu", "") or found.versions
    assert set(found.source) == {"git_sha", "git_dirty", "code_sha256"}
    assert found.time_utc.endswith("Z")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.contender = "other"


def noisy(median, spread, count=12, seed=0):
    return median * (1 + spread * np.random.default_rng(seed).standard_normal(count))


def test_compare_tells_noise_from_change():
    quiet = row(noisy(1.0, 0.02))
    again = row(noisy(1.0, 0.02, seed=1))
    slow = row(noisy(1.2, 0.02, seed=2))
    assert [c.verdict for c in compare.changes([quiet], [again])] == ["noise"]
    assert [c.verdict for c in compare.changes([quiet], [slow])] == ["worse"]
    assert [c.verdict for c in compare.changes([slow], [quiet])] == ["better"]
    rates = [row(1 / np.array(r.samples), metric="pairs_per_s") for r in (quiet, slow)]
    assert [c.verdict for c in compare.changes(rates[:1], rates[1:])] == ["worse"]


def test_compare_asks_more_of_a_noisy_bench():
    rows = [row(noisy(median, 0.4, count=6, seed=3)) for median in (1.0, 1.2)]
    (change,) = compare.changes(rows[:1], rows[1:])
    assert change.noise_relative > 0.2
    assert change.verdict == "noise"


def test_compare_knows_what_one_sample_is_worth():
    def verdict(old, new, metric):
        (change,) = compare.changes([row((old,), metric=metric)], [row((new,), metric=metric)])
        return change.verdict

    assert verdict(1.0, 1.4, "build_s") == "noise"
    assert verdict(1.0, 1.6, "build_s") == "worse"
    assert verdict(30.0, 40.0, "peak_mib") == "noise"
    assert verdict(1000.0, 1120.0, "peak_mib") == "worse"
    assert verdict(1000.0, 1190.0, "longest_pair_tokens") == "better"


def test_compare_takes_the_latest_of_equal_cases_only(tmp_path, capsys):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    harness.append([row(noisy(9.0, 0.01)), row(noisy(1.0, 0.01)), row(contender="trl")], old)
    harness.append([row(noisy(1.3, 0.01)), row(contender="liger")], new)
    assert compare.main([str(old), str(new)]) == 1
    assert "1 figures compared" in capsys.readouterr().out
    assert compare.main([str(old), str(old)]) == 0
    elsewhere = tmp_path / "elsewhere.jsonl"
    harness.append([row(machine={"name": "another"})], elsewhere)
    assert compare.main([str(old), str(elsewhere)]) == 2


def timed(work, count=25):
    watch = Stopwatch(torch.device("cpu"))
    return [watch.measure(work)["cpu_s"] for _ in range(count)]


def spin(cpu_s):
    ends = time.process_time() + cpu_s
    while time.process_time() < ends:
        pass


def test_two_runs_are_noise_and_a_fifth_slower_is_flagged():
    first, second, slow = (row(timed(lambda s=s: spin(s))) for s in (0.004, 0.004, 0.0048))
    assert [c.verdict for c in compare.changes([first], [second])] == ["noise"]
    assert [c.verdict for c in compare.changes([first], [slow])] == ["worse"]


def test_the_report_names_every_row(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need fastdpo[bench]")
    path = tmp_path / "rows.jsonl"
    rows = [
        row(),
        row((2.0, 2.2, 2.4), "trl", of_roofline=0.25),
        row((), "unsloth", outcome=MISSING, note="not | installed"),
        row((9000.0,), metric="useful_tokens_per_s"),
        row((100.0,), metric="peak_mib", case={"pair_tokens": 256}, question="memory"),
        row((150.0,), metric="peak_mib", case={"pair_tokens": 512}, question="memory"),
        row((0.7, 0.6), metric="loss_nat", question="quality"),
    ]
    harness.append(rows, path)
    written = report.write(path)
    assert {p.name for p in written} == {"RESULTS.md", "memory.png", "throughput.png", "curve.png"}
    text = written[0].read_text()
    assert all(r.id in text for r in rows)
    assert "| 2.2 (2.08, 2.32) | 2.00 | 25.0% | None |" in text
    assert "missing: not / installed" in text


def test_the_machine_and_its_memory_are_measured():
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    block = torch.ones(24 * 2**20, dtype=torch.uint8)
    del block
    assert 20 < peak.over_start()["peak_mib"] < 200


def test_inputs_are_what_they_are_said_to_be():
    peaked, random = (
        inputs.peakedness(inputs.head_inputs(kind, 128, 64, 512, dtype=torch.float32, device="cpu"))
        for kind in ("peaked", "random")
    )
    assert peaked["mean_top1_probability"] > 0.5 > 0.1 > random["mean_top1_probability"]
    lengths = np.array(inputs.pair_lengths(400, longest=512))
    assert (lengths[:, :1] + lengths[:, 1:]).max() <= 512
    assert inputs.pair_lengths(5) == inputs.pair_lengths(5)


def test_contenders_take_turns_and_their_ends_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_LOG", str(tmp_path / "log"))
    function = "tests.project.failing_contender:failing_contender"
    contenders = contest.contest(
        {"a": function, "b": function, "c": "bench.heads:no_such_thing"},
        {"a": {"how": "memory"}, "b": {"how": "peer"}, "c": {}},
        warm_up=0,
        rounds=3,
    )
    results = dict(contenders)
    assert {name: r.outcome for name, r in results.items()} == {
        "a": harness.OUT_OF_MEMORY,
        "b": MISSING,
        "c": harness.FAILED,
    }
    assert results["a"].column("wall_s") == [0.5]
    assert results["a"].facts == {"fact": 1}
    assert "no_such_thing" in results["c"].note


def test_a_tiny_update_is_measured_in_process(tmp_path, monkeypatch):
    """One question from case to rows, its contender in this process."""
    monkeypatch.setattr(memory, "contest", in_process)
    recorder = Recorder("memory", tmp_path / "rows.jsonl")
    case = {"tuning": "lora", "checkpointing": True, "model": "tiny", "dtype": "float32"}
    case |= {"device": "cpu", "pairs": 2, "pair_tokens": 64}
    memory.peak(recorder, case, ("fastdpo",))
    (found,) = harness.read(tmp_path / "rows.jsonl")
    assert (found.metric, found.outcome) == ("peak_mib", MEASURED)
    assert found.case["pair_tokens"] == 64


class InProcessTurns(contest.Turns):
    """Turns without a process: so many, then no more."""

    def __init__(self, count):
        self.left, self.result = count, None

    def wait(self):
        self.left -= 1
        return self.left >= 0

    def answer(self, figures):
        if self.result is None:
            facts = {k: v for k, v in figures.items() if k != "outcome"}
            self.result = contest.Result(figures["outcome"], "", facts)
        else:
            self.result.turns.append(dict(figures))


def in_process(functions, cases, *, warm_up, rounds, **_):
    from bench import trainers

    for name in functions:
        turns = InProcessTurns(warm_up + rounds)
        trainers.contend(cases[name], turns)
        assert [t["run_tokens"] >= 2 * 62 for t in turns.result.turns] == [True] * rounds
        yield name, turns.result


def test_the_gpu_plan_fits_and_goes_on_past_failures(tmp_path):
    steps = gpu.plan(tmp_path / "rows.jsonl")
    assert sum(step.limit_s for step in steps) <= gpu.LIMIT_S
    names = [step.name for step in steps]
    assert names[:4] == ["compile", "kernel tests", "bench.kernel ours", "bench.kernel rest"]
    kernels, others = ({Path(name).name for name in names} for names in gpu.gpu_tests())
    assert kernels == set(gpu.KERNEL_TESTS)
    assert len(others) >= 4
    assert "test_normalize.py" not in others, "it imports TRL"
    some = gpu.only(steps, ["memory", "kernel"])
    wanted = ["bench.kernel ours", "bench.kernel rest", "bench.memory", "report"]
    assert [step.name for step in some] == wanted
    with pytest.raises(ValueError, match="no step speed: there are compile, kernel_tests"):
        gpu.only(steps, ["speed"])
    python = sys.executable
    write = "open('rows.jsonl', 'a').write('{}\\n'); print('here')"
    outcomes = gpu.carry_out(
        [
            gpu.Step("fails", (python, "-c", "raise SystemExit(3)"), 30),
            gpu.Step("hangs", (python, "-c", "import time; time.sleep(60)"), 1.2),
            gpu.Step(
                "passes", (python, "-c", f"import os; os.chdir({str(tmp_path)!r}); {write}"), 9
            ),
        ],
        tmp_path,
        limit_s=61.2,
    )
    assert [o.ended.split(" at ")[0] for o in outcomes] == ["failed (3)", "timed out", "passed"]
    assert [o.rows for o in outcomes] == [0, 0, 1]
    assert "here" in (tmp_path / "bench.log").read_text()
    late = gpu.carry_out([gpu.Step("late", (python, "-c", ""), 30)], tmp_path, limit_s=0.0)
    assert late[0].ended == gpu.NEVER
    assert "hangs" in gpu.short_table(outcomes, [row()])


def test_the_gpu_run_is_cut_off_with_a_table_and_resumed(tmp_path, monkeypatch):
    steps = [gpu.Step(name, ("true",), 10) for name in ("first", "second", "third", "report")]
    done = tmp_path / "done" / "steps.json"
    ran, cut = [], [True]

    def run(step, log_path, limit_s):
        ran.append((step.name, limit_s))
        if step.name == "second" and cut:
            raise KeyboardInterrupt
        return "passed"

    monkeypatch.setattr(gpu, "_run", run)
    outcomes = gpu.carry_out(steps, tmp_path, limit_s=40, progress=gpu.Progress(done))
    assert [o.ended for o in outcomes] == ["passed", "cut off", gpu.NEVER, gpu.NEVER]
    assert [limit for _, limit in ran] == pytest.approx([10, 40 / 3], abs=0.2)
    cut.clear()
    ran.clear()
    outcomes = gpu.carry_out(steps, tmp_path, limit_s=60, progress=gpu.Progress(done, resumes=True))
    assert outcomes[0].ended.startswith("done before (20")
    assert [o.ended for o in outcomes[1:]] == ["passed"] * 3
    assert ran[0] == ("second", pytest.approx(20, abs=0.1)), "what is done leaves its time"
    again = gpu.carry_out(steps, tmp_path, progress=gpu.Progress(done))
    assert [o.ended for o in again] == ["passed"] * 4, "without RESUME all is run"


def test_every_step_of_the_gpu_run_starts_in_time(tmp_path, monkeypatch):
    """The rehearsal of `make gpu DRY=1`, its stand-ins on a clock that nobody waits for."""
    now = [100.0]

    def run(step, log_path, limit_s):
        took_s = float(step.command[1])
        now[0] += min(took_s, limit_s)
        return "passed" if took_s < limit_s - gpu.GRACE_S else "timed out"

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    steps = gpu.plan(tmp_path / "rows.jsonl")
    for stuck in (False, True):
        found = rehearsal.schedule(steps, speed=1.0, stuck=stuck)
        rehearsal.check(found, stuck=stuck)
        assert sum(one.seconds for one in found) == pytest.approx(gpu.LIMIT_S)
        assert found[2].started_s < (60 if not stuck else 120), "bench.kernel, ours and TRL"
    with pytest.raises(AssertionError, match="does not fit"):
        rehearsal.check([gpu.Outcome("compile", "timed out", 30, 0.0)], stuck=False)
    with pytest.raises(AssertionError, match="never reached"):
        rehearsal.check([gpu.Outcome("report", gpu.NEVER)], stuck=True)


def test_what_was_measured_before_is_passed_over_when_resumed(tmp_path, monkeypatch):
    recorder = Recorder("step", tmp_path / "rows.jsonl")
    recorder.add({"pairs": 2}, "fastdpo", "update_s", [0.25])
    recorder.add({"pairs": 2}, "trl", "update_s", outcome=MISSING, note="not installed")
    assert not recorder.has({"pairs": 2}, "fastdpo", "update_s")
    monkeypatch.setenv("BENCH_RESUME", "1")
    again = Recorder("step", tmp_path / "rows.jsonl")
    assert again.has({"pairs": 2}, "fastdpo", "update_s")
    assert not again.has({"pairs": 4}, "fastdpo", "update_s")
    assert not again.has({"pairs": 2}, "trl", "update_s"), "it may be installed by now"


def test_a_contender_that_does_not_answer_leaves_time_to_others(monkeypatch):
    assert contest.left_s() == float("inf")
    monkeypatch.setenv("BENCH_ENDS_AT", f"{time.time() + 50:.1f}")
    assert 48 < contest.left_s() < 51
    monkeypatch.setenv("BENCH_ENDS_AT", "0")
    assert contest.left_s() == 1.0


def test_python_m_bench_lists_the_questions():
    listed = subprocess.run(
        [sys.executable, "-m", "bench"], cwd=ROOT, env=dict(os.environ), capture_output=True,
        text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    for question in ("kernel", "step", "memory", "reference", "quality", "report", "compare"):
        assert f"python -m bench.{question}" in listed


def test_committed_rows_can_be_read():
    if not harness.RESULTS.exists():
        pytest.skip("no rows are committed yet")
    rows = harness.read()
    assert rows
    assert len({r.id for r in rows}) == len(rows)

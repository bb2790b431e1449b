"""Rows: what every bench writes, one line of JSON a figure, appended and never changed.

A row is complete in itself: the case, the contender, the raw samples, the machine, the versions and
the very source they were taken with. What went wrong is a row too.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "rows.jsonl"
SCHEMA = 1

MEASURED, MISSING, OUT_OF_MEMORY, FAILED = "measured", "missing", "out of memory", "error"
OUTCOMES = (MEASURED, MISSING, OUT_OF_MEMORY, FAILED)
SEED = 0
"""Of every model and every draw; written into the rows."""

UNITS = ("_s", "_ms", "_mib", "_gib", "_per_s", "_tokens", "_nat", "_relative", "_bytes", "_count")
"""How a metric's name ends: it says its unit."""

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "datasets",
    "liger-kernel", "cut-cross-entropy", "unsloth", "numpy",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of one contender in one case.

    Args:
        question: the bench that asked, by its file's name.
        case: sizes and settings, units in the names; rows of one case are comparable.
        contender: fastdpo or a peer, with its variant.
        metric: what the samples are, its unit last (`update_s`).
        samples: raw values in the order in which they were taken; empty unless measured.
        outcome: one of `OUTCOMES`.
        note: what a reader must know, the error's text for instance.
        of_roofline: the part of what the machine's measured rates allow that was reached.
        machine: where; `versions`: of what; `source`: git sha, dirty flag, hash of the code.
        load_average: processes that wanted a CPU in the last minute when the row was written.
        run: shared by the rows of one command.
    """

    question: str
    case: Mapping[str, Any]
    contender: str
    metric: str
    samples: tuple[float, ...] = ()
    outcome: str = MEASURED
    note: str = ""
    of_roofline: float | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    load_average: float | None = None
    seed: int = SEED
    run: str = ""
    time_utc: str = ""

    def __post_init__(self) -> None:
        if not self.metric.endswith(UNITS):
            raise ValueError(f"metric {self.metric!r} has no unit: end it in one of {UNITS}.")
        if self.outcome not in OUTCOMES or (self.outcome == MEASURED) != bool(self.samples):
            raise ValueError(f"outcome {self.outcome!r} does not fit {len(self.samples)} samples.")

    @property
    def id(self) -> str:
        """Question and twelve hex digits of the content: what README names a figure by."""
        content = json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        return f"{self.question}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @property
    def quantiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80 of the samples."""
        return spread(self.samples)

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantiles[1]

    @property
    def key(self) -> tuple[str, ...]:
        """Rows with equal keys are measurements of the same thing; the later supersedes."""
        case = json.dumps(dict(self.case), sort_keys=True)
        return (self.machine.get("name", ""), self.question, case, self.contender, self.metric)


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80; of one sample, three times itself."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def append(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Add rows at the end of the file; nothing in it is ever changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            line = {"schema": SCHEMA, "id": row.id} | asdict(row)
            if row.samples:
                line |= dict(zip(("p20", "p50", "p80"), row.quantiles, strict=True))
            file.write(json.dumps(line, allow_nan=False) + "\n")


def read(path: Path = RESULTS) -> list[Row]:
    """All rows of a file, in order.

    Raises:
        ValueError: a line is of another schema, or was changed after it was written.
    """
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = json.loads(text)
        if line.pop("schema") != SCHEMA:
            raise ValueError(f"{path}:{number} is of another schema than {SCHEMA}.")
        written_id = line.pop("id")
        for derived in ("p20", "p50", "p80"):
            line.pop(derived, None)
        row = Row(**line | {"samples": tuple(line["samples"])})
        if row.id != written_id:
            raise ValueError(f"{path}:{number} was changed after it was written: {written_id}.")
        rows.append(row)
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every key."""
    return list({row.key: row for row in rows}.values())


class Recorder:
    """Makes the rows of one command, appends each as soon as it is there, and prints it.

    Args:
        question: the bench that asks.
        path: the file of rows.
        prints: False where there are too many to read.
    """

    def __init__(self, question: str, path: Path = RESULTS, *, prints: bool = True) -> None:
        self.question, self.path, self.prints = question, path, prints
        self.environment: dict[str, Any] = {
            "machine": machine(),
            "versions": versions(),
            "source": source(),
            "run": f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}",
        }
        self.rows: list[Row] = []
        self._before: set[tuple[str, ...]] | None = None

    def has(self, case: Mapping[str, Any], contender: str, metric: str) -> bool:
        """Whether BENCH_RESUME is set and the file has this machine's figure, or out of memory."""
        if not os.environ.get("BENCH_RESUME"):
            return False
        if self._before is None:
            rows = read(self.path) if self.path.exists() else []
            self._before = {row.key for row in rows if row.outcome in (MEASURED, OUT_OF_MEMORY)}
        wanted = Row(
            question=self.question, case=case, contender=contender, metric=metric, outcome=FAILED,
            machine=self.environment["machine"],
        )  # fmt: skip
        return wanted.key in self._before

    def add(
        self,
        case: Mapping[str, Any],
        contender: str,
        metric: str,
        samples: Sequence[float] = (),
        **more: Any,
    ) -> Row:
        """Write one row; `more` are outcome, note, of_roofline."""
        row = Row(
            question=self.question,
            case=case,
            contender=contender,
            metric=metric,
            samples=tuple(round(float(sample), 9) for sample in samples),
            load_average=round(os.getloadavg()[0], 2),
            time_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            **self.environment | more,
        )
        append([row], self.path)
        self.rows.append(row)
        if self.prints:
            print(described(row), flush=True)
        return row


def described(row: Row) -> str:
    """One line for the terminal."""
    case = " ".join(f"{name}={value}" for name, value in row.case.items())
    figure = row.outcome
    if row.samples:
        figure = "p20 {:.4g} p50 {:.4g} p80 {:.4g}".format(*row.quantiles)
        figure += f" ({len(row.samples)} samples)"
    if row.of_roofline is not None:
        figure += f", {row.of_roofline:.1%} of roofline"
    note = f" [{row.note}]" if row.note else ""
    return f"{row.question}: {row.contender}: {row.metric} {figure} | {case}{note}"


@cache
def machine() -> dict[str, Any]:
    """The GPU if there is one, else the CPU, under `name`, and what else bounds a figure."""
    import torch

    found: dict[str, Any] = {
        "name": _cpu_name(),
        "cpus": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "card_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


@cache
def versions() -> dict[str, str]:
    """Of the packages that can change a figure, as installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


@cache
def source() -> dict[str, Any]:
    """Commit, whether the tree differs from it, and a hash of the code that was really run."""
    changes = _output("git", "status", "--porcelain", "--", "fastdpo", "kernels", "bench/*.py")
    digest = hashlib.sha256()
    for folder in ("bench", "fastdpo", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return {
        "git_sha": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "git_dirty": None if changes is None else bool(changes),
        "code_sha256": digest.hexdigest()[:12],
    }


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} x{os.cpu_count()}"

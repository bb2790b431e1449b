"""Time and memory of a piece of work, on the CPU or on a CUDA card."""

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.harness import spread

MIB = 2**20


class Stopwatch:
    """Wall and CPU seconds of a piece of work; on CUDA the time between two events.

    CPU seconds are those of all threads of this process: what others do on a busy machine hardly
    moves them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._began = (0.0, 0.0)

    def start(self) -> None:
        """Count from here."""
        if self.device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._began = (time.perf_counter(), time.process_time())

    def stop(self) -> dict[str, float]:
        """`wall_s` and `cpu_s` since `start`, when all that was begun is done."""
        wall_s = time.perf_counter() - self._began[0]
        if self.device.type == "cuda":
            self._events[1].record()
            self._events[1].synchronize()
            wall_s = self._events[0].elapsed_time(self._events[1]) / 1e3
        return {"wall_s": wall_s, "cpu_s": time.process_time() - self._began[1]}

    def measure(self, work: Callable[[], object]) -> dict[str, float]:
        """Run `work` once: `wall_s` and `cpu_s`."""
        self.start()
        work()
        return self.stop()


def median_s(
    work: Callable[[], object], device: torch.device, *, warm_up: int, repeats: int
) -> float:
    """Median wall seconds of `work` after `warm_up` runs that are not counted."""
    watch = Stopwatch(device)
    taken = [watch.measure(work)["wall_s"] for _ in range(warm_up + repeats)]
    return spread(taken[warm_up:])[1]


class PeakMemory:
    """The most memory since `start`, above what was in use then.

    On CUDA it is the allocator's figure, on Linux the resident set, whose high-water mark the
    kernel lets a process reset; elsewhere the mark cannot be reset and the figure is a bound.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base_bytes = 0

    def start(self) -> None:
        """Count from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.base_bytes = torch.cuda.memory_allocated()
            return
        _return_free_memory()
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5")
        self.base_bytes = _status_bytes("VmRSS")

    def over_start(self) -> dict[str, float]:
        """`peak_mib` above the start; on CUDA also what the allocator had reserved."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - self.base_bytes
            return {
                "peak_mib": peak / MIB,
                "peak_reserved_mib": torch.cuda.max_memory_reserved() / MIB,
            }
        return {"peak_mib": (_status_bytes("VmHWM") - self.base_bytes) / MIB}


def _return_free_memory() -> None:
    """Give freed heap back to the system, so that its reuse counts as use."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (the most) of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

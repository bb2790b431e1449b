"""system/limits.py: work that would not end, or would take all memory, is stopped."""

import re
import signal
import sys
import threading

import pytest

from fastdpo.system.limits import TooSlowError, available_bytes, cpu_seconds, more_memory

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux bounds the address space")


def test_a_pattern_that_runs_for_ever_is_stopped():
    with pytest.raises(TooSlowError, match=r"after 0\.1 seconds"), cpu_seconds(0.1):
        re.fullmatch("(a+)+$", "a" * 60 + "b")


def test_a_loop_is_stopped():
    def count_for_ever():
        with cpu_seconds(0.1):
            while True:
                pass

    with pytest.raises(TooSlowError):
        count_for_ever()


def test_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGVTALRM)
    with cpu_seconds(0.2):
        pass
    until = 10**6
    assert sum(range(until)) == until * (until - 1) // 2
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_other_threads_work_without_the_bound():
    done = []

    def work():
        with cpu_seconds(10):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


@on_linux
def test_memory_is_refused_beyond_the_bound_and_given_afterwards():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), more_memory(2**26):
        bytearray(2**28)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with more_memory(2**28):
        assert len(bytearray(2**26)) == 2**26


@on_linux
def test_the_available_memory_is_a_size():
    assert 2**20 < (available_bytes() or 0) < 2**60

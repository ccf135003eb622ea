import time

import pytest
import torch

from sparselab.resources import PeakMemory, Stopwatch

CPU = torch.device("cpu")


def test_a_large_tensor_that_is_gone_again_is_seen_and_nothing_is_not():
    with PeakMemory(CPU) as idle:
        pass
    with PeakMemory(CPU) as busy:
        large = torch.ones(30_000_000)  # 120 MB
        time.sleep(0.05)  # a few samples
        del large
    assert idle.bytes < 10e6
    assert 110e6 < busy.bytes < 160e6


def test_what_was_freed_before_is_counted_when_it_is_taken_again():
    pieces = [bytearray(100_000) for _ in range(1000)]  # small enough to stay with the C library when freed
    last = bytearray(100_000)  # keeps the heap from shrinking by itself
    del pieces
    with PeakMemory(CPU) as memory:
        again = [bytearray(100_000) for _ in range(1000)]
        torch.ones(1)
    assert memory.bytes > 80e6
    del again, last


def test_a_stage_inside_another_interrupts_it():
    watch = Stopwatch(CPU)
    with watch.stage("outer"):
        time.sleep(0.02)
        with watch.stage("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    time.sleep(0.05)  # belongs to nobody
    with watch.stage("inner"):
        time.sleep(0.01)
    seconds = watch.seconds()
    assert list(seconds) == ["outer", "inner"]
    assert seconds["outer"] == pytest.approx(0.04, abs=0.015)
    assert seconds["inner"] == pytest.approx(0.06, abs=0.015)

"""Timers: interleaved passes, medians, time limits, and peak memory."""

import time

import pytest
import torch

from llava.analysis.efficiency.timing import Timing, compare, machine, measure, peak_bytes, quotient


def test_variants_are_interleaved():
    order = []
    runs = {name: lambda n=name: order.append(n) for name in "ab"}
    spent = compare(runs, repeats=3, warmup=1)
    assert order == list("ababbaab")
    assert {(one.passes, one.warmup) for one in spent.values()} == {(3, 1)}


def test_medians_and_limits():
    waits = iter([0.0, 0.03, 0.0, 0.0])
    spent = measure(lambda: time.sleep(next(waits)), repeats=3)
    assert spent.median < 0.01 < 0.03 <= spent.slowest and spent.fastest <= spent.median
    limited = compare({"it": lambda: time.sleep(0.02)}, repeats=50, warmup=0, limit=0.01)
    assert limited["it"].passes == 1
    assert spent.processor < 0.01  # sleeping takes no processor time
    with pytest.raises(ValueError, match="repeats >= 1"):
        measure(lambda: None, repeats=0)


def test_quotients_are_of_medians_and_of_processor_time():
    slow, fast = Timing.of([(6.0, 4.0)] * 3, 0), Timing.of([(2.0, 1.0)] * 3, 0)
    assert quotient("speedup", slow, fast) == {"speedup": 3.0, "speedup_processor": 4.0}
    assert quotient("speedup", slow, Timing.of([(2.0, None)], 0)) == {"speedup": 3.0}


def test_peak_memory_counts_what_exists_at_a_time():
    kib = 1024
    assert peak_bytes(lambda: torch.zeros(64 * kib, dtype=torch.uint8)) == pytest.approx(64 * kib, rel=0.01)

    def one_after_the_other():
        for _ in range(5):
            torch.zeros(256 * kib, dtype=torch.uint8)

    assert peak_bytes(one_after_the_other) == pytest.approx(256 * kib, rel=0.01)
    both = peak_bytes(lambda: (torch.zeros(256 * kib, dtype=torch.uint8), torch.zeros(256 * kib)))
    assert both == pytest.approx(5 * 256 * kib, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_timing_and_memory_on_a_gpu():
    spent = measure(lambda: torch.ones(1 << 24, device="cuda").sum(), "cuda")
    assert 0 < spent.fastest <= spent.median and spent.processor is None
    assert peak_bytes(lambda: torch.zeros(1 << 20, dtype=torch.uint8, device="cuda"), "cuda") == 1 << 20
    assert machine("cuda")["name"] == torch.cuda.get_device_name()

"""The stopwatch: host time on a CPU, events on CUDA (a stand-in here) that are read without waiting."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from llava.eval.inference.stopwatch import Stopwatch


def test_on_a_cpu_spans_are_added_when_they_end():
    stats, watch = SimpleNamespace(seconds=1.0, other=0.0), Stopwatch("cpu")
    with watch.span(stats, "seconds"):
        time.sleep(0.02)
    assert 1.02 <= stats.seconds < 1.5 and stats.other == 0
    with pytest.raises(ValueError, match="broken"), watch.span(stats, "other"):
        time.sleep(0.01)
        raise ValueError("broken")
    assert 0.01 <= stats.other < 0.5
    watch.settle()  # nothing is left
    assert stats.seconds < 1.5


class Device:
    """A queue whose work takes seconds of its own clock; the host does not wait unless it synchronizes."""

    def __init__(self) -> None:
        self.clock, self.reached, self.waits = 0.0, 0.0, 0

    def work(self, seconds: float) -> None:
        self.clock += seconds

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda stream: setattr(event, "at", self.clock)
        event.query = lambda: self.reached >= event.at
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)

        def synchronize() -> None:
            self.waits += 1
            self.reached = self.clock

        event.synchronize = synchronize
        return event


@pytest.fixture
def device(monkeypatch) -> Device:
    found = Device()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return found


def test_on_cuda_events_are_read_at_the_end_with_one_wait(device):
    stats, watch = SimpleNamespace(vision=0.0, answers=0.0), Stopwatch("cuda:0")
    for _ in range(3):
        with watch.span(stats, "vision"):
            device.work(2.0)
        with watch.span(stats, "answers"):
            device.work(0.5)
    assert (stats.vision, stats.answers, device.waits) == (0, 0, 0)
    watch.settle()
    assert (stats.vision, stats.answers, device.waits) == (6.0, 1.5, 1)
    watch.settle()
    assert (stats.vision, device.waits) == (6.0, 1)


def test_on_cuda_spans_that_have_ended_are_read_before_they_are_many(device):
    stats, watch = SimpleNamespace(seconds=0.0), Stopwatch("cuda")
    for number in range(2000):
        with watch.span(stats, "seconds"):
            device.work(1.0)
        device.reached = number  # a little behind
    assert stats.seconds > 1000 and len(watch._pending) < 600 and device.waits == 0
    watch.settle()
    assert stats.seconds == 2000

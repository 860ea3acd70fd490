"""A small share of `python -m tests.stress.kills`."""

from __future__ import annotations

from stress.kills import stress


def test_a_killed_submission_ends_as_if_undisturbed():
    """Runs are killed by tests/eval/test_run.py, processes by tests/eval/jobs/test_processes.py."""
    kills, ends, different = stress(3, seed=1, only=["submit"])
    assert kills >= 3 and ends >= 1 and not different

"""A small share of `python -m tests.stress.kills`."""

from __future__ import annotations

from stress.kills import stress


def test_a_killed_run_and_a_killed_submission_end_as_if_undisturbed():
    kills, ends, different = stress(3, seed=1, only=["run", "submit"])
    assert kills >= 3 and ends >= 1 and not different

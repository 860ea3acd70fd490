"""A small share of `python -m tests.fuzz`: no traceback and no silently changed score."""

from __future__ import annotations

import random

import pytest

from fuzz.__main__ import fuzz
from fuzz.mutations import MUTATIONS, mutate


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_errors_in_words_and_no_score_changes_silently(seed):
    calls, found = fuzz(200, seed)
    assert calls == 200 and not found, [f"{one.call}: {one.what}" for one in found]


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_changes_something(name):
    content = (
        b'{"question_id": 1, "text": "yes", "ids": [1, 2]}\n' * 2 + b'{"question_id": 2, "text": "no"}\n'
    )
    changed = {mutate(name, content, "jsonl", random.Random(seed)) for seed in range(30)}
    assert changed - {content}

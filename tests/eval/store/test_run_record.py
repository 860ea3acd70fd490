"""What lies beside an answer file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from llava.eval.store.provenance import Configuration
from llava.eval.store.run_record import FAILURES, RunRecord, beside, recorded_batch_size

CONFIGURATION = Configuration(
    *(
        "toy",
        "w",
        "q",
        (("method", "none"), ("tokens", None)),
        "vicuna_v1",
        "float16",
        "float16",
        "sdpa",
        "cuda",
    ),
    8,
)


def made(size: int | None, command: tuple[str, ...] = (), **more: object) -> tuple[RunRecord, dict]:
    """Return the record and the metadata of a run with a batch size."""
    one = dataclasses.replace(CONFIGURATION, batch_size=size, **more)
    record = RunRecord(["llava.eval.run", *command], {}, "pope", 60, 0, one.hash(), one.flat(), "2026")
    return record, one.metadata()


def test_answer_files_without_a_suffix_do_not_share_their_lists(tmp_path):
    names = [beside(tmp_path / name, FAILURES).name for name in ("r_0.5.jsonl", "r_0.5", "r_0.25")]
    assert names == ["r_0.5.failures.jsonl", "r_0.5.failures.jsonl", "r_0.25.failures.jsonl"]


def test_the_batch_size_of_an_earlier_start(tmp_path):
    record, answers = tmp_path / "run.json", tmp_path / "answers.jsonl"
    assert recorded_batch_size(record, [answers], CONFIGURATION) is None
    answers.write_text(json.dumps({"metadata": made(48)[1]}) + "\n")
    assert recorded_batch_size(record, [answers], CONFIGURATION) == 48
    made(96)[0].write(record)
    assert recorded_batch_size(record, [answers], CONFIGURATION) == 96  # of the last start
    assert recorded_batch_size(record, [], dataclasses.replace(CONFIGURATION, seed=1)) is None
    sampled = dataclasses.replace(CONFIGURATION, temperature=1.0)
    assert recorded_batch_size(record, [answers], sampled) is None
    made(12, temperature=1.0)[0].write(record)
    assert recorded_batch_size(record, [], sampled) == 12


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ((), 16),
        (("--batch-size", "5"), 5),
        (("--batch-size", "9" * 5000), None),
        (("--batch-size", "x"), None),
        (("--batch-size",), 16),
    ],
)
def test_records_of_versions_without_a_batch_size(tmp_path, command, size):
    record = tmp_path / "run.json"
    made(None, command)[0].write(record)
    assert recorded_batch_size(record, [], CONFIGURATION) == size


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 100_000, '{"metadata": 3}', '{"metadata": {"batch_size": 8}}', "\0"],
)
def test_what_is_not_a_record_decides_nothing(tmp_path, content):
    for name in ("run.json", "answers.jsonl"):
        (tmp_path / name).write_text(content)
    os.mkfifo(tmp_path / "pipe")  # is not opened
    answers: list[Path] = [tmp_path / "answers.jsonl", tmp_path / "pipe", tmp_path, tmp_path / "missing"]
    assert recorded_batch_size(tmp_path / "run.json", answers, CONFIGURATION) is None

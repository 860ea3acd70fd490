"""Answer files as tests compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import Benchmark, Score
from llava.eval.benchmarks.files import read_answers
from llava.eval.score import main as score_main


def without_ids(path: Path) -> list[dict]:
    """Return the answers of a file without their random `answer_id`."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{key: value for key, value in row.items() if key != "answer_id"} for row in rows]


def all_answers(benchmark: Benchmark, path: Path) -> list[dict]:
    """Return the answers of a file, which may all be empty."""
    return read_answers(path, benchmark.answer_shape, benchmark.list_shape)


def score_document(benchmark: Benchmark, data: Path, path: Path, capsys) -> dict[str, Any]:
    """Return the last line of the score command; of answers that are all empty, what the rule gives them."""
    code = score_main(["--benchmark", benchmark.name, "--data", str(data), "--answers", str(path)])
    printed = capsys.readouterr()
    if "empty" not in path.name:
        assert code == 0
        return json.loads(printed.out.splitlines()[-1])
    assert code == 1 and "answers are empty" in printed.err
    return benchmark.score(data, all_answers(benchmark, path)).document()


def other_warnings(score: Score) -> list[str]:
    """Return the warnings of a score except the one about unreadable answers, which is there if any are."""
    found = [one for one in score.warnings if "the official rule does not read" not in one]
    assert len(score.warnings) - len(found) == bool(score.unreadable)
    return found

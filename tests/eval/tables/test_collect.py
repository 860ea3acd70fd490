"""Reading score.json files: old and new names, servers' scores, duplicates, and files that cannot be used."""

from __future__ import annotations

import json

import pytest

from helpers.score_files import CHECKPOINT, write_score
from llava.eval.benchmarks.base import DataError
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.tables.collect import read_results
from llava.eval.tables.paper import build_paper_table
from llava.eval.tables.published import load_published

OLD_SWEEP = {"answers": 8910, "low": 79.0, "high": 81.0, "cell": "vispruner-r0.5-64", "visual_tokens": 64.0}
OLD_RUN = {"answers": "outputs/pope/answers.jsonl", "answered": 8910, "asked": 8910, "visual_tokens": 64.0}


@pytest.mark.parametrize("old", [OLD_SWEEP, OLD_RUN], ids=["sweep", "run"])
def test_old_and_new_files_give_the_same_rows(tmp_path, old):
    """`answers` was a path in files of runs and a count in those of sweeps."""
    more = {"llm_gflops": 3000.0, "gflops": {"shape": [2, 64, 99, 32], "text_tokens": 9}}
    write_score(tmp_path / "old", "pope", 80.0, **old, **more)
    card = Scorecard.read(tmp_path / "old" / "score.json")
    (tmp_path / "new").mkdir()
    names = {"low", "high", "cell", "answers", "asked", "gflops"}
    new = {key: value for key, value in card.document().items() if key not in names}
    (tmp_path / "new" / "score.json").write_text(json.dumps(new))
    tables = []
    for kind in ("old", "new"):
        (result,), warnings = read_results([tmp_path / kind])
        assert warnings == [] and result.card.answered == 8910 and result.full_set
        assert result.kv_elements == 2 * 2 * 32
        table = build_paper_table(load_published()["llava-1.5-7b"], [result])
        tables.append((table.document(), table.csv().replace(f"{tmp_path / kind}", "")))
    assert tables[0] == tables[1]


def test_a_server_may_have_scored(tmp_path):
    write_score(tmp_path, "vqav2", None)
    (tmp_path / "server.json").write_text('{"score": 72.5}')
    assert read_results([tmp_path])[0][0].card.score == 72.5
    (tmp_path / "server.json").write_text('{"points": 72.5}')
    (result,), warnings = read_results([tmp_path])
    assert result.card.score is None and "server.json" in warnings[0]


@pytest.mark.parametrize("name", ["score.json", "server.json"])
def test_answers_complete_a_score(tmp_path, name):
    """A server's score may be next to the answers alone."""
    metadata = {"model": CHECKPOINT, "method": "vispruner", "tokens": 64, "important_ratio": 0.5}
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question_id": 1, "metadata": metadata}) + "\n")
    (tmp_path / name).write_text('{"benchmark": "vqav2", "score": 72.5}')
    (result,), warnings = read_results([tmp_path])
    card = result.card
    assert warnings == [] and (card.model, card.benchmark, card.score) == (CHECKPOINT, "vqav2", 72.5)
    assert (card.method, card.tokens, card.important_ratio) == ("vispruner", 64, 0.5)


def test_full_sets_win_over_parts_and_new_files_over_old(tmp_path):
    write_score(tmp_path / "b", "pope", 80.0, answers=8910)
    write_score(tmp_path / "a", "pope", 90.0, answers=120)  # newer, but a part of the set
    (result,), warnings = read_results([tmp_path])
    assert result.card.score == 80.0 and "left out (90.00)" in warnings[0] and "complete" in warnings[0]
    write_score(tmp_path / "c", "pope", 81.0, answered=8910)
    (result,), warnings = read_results([tmp_path, tmp_path / "c" / "score.json"])
    assert result.card.score == 81.0 and len(warnings) == 2 and any("is newer" in one for one in warnings)


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not a JSON document"),
        ("[1]", "not a score of a benchmark"),
        ('{"benchmark": "nope", "score": 1}', "unknown benchmark 'nope'"),
        ('{"benchmark": "pope", "score": "1"}', "not a number"),
        ('{"benchmark": "pope", "score": 1, "method": "none"}', "no model and no tokens"),
        (
            '{"benchmark": "pope", "score": 1, "method": "x", "model": "m", "tokens": "64"}',
            "neither a number",
        ),
    ],
)
def test_unusable_results_are_named_and_left_out(tmp_path, content, says):
    write_score(tmp_path / "good", "pope", 80.0)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "score.json").write_text(content)
    results, (warning,) = read_results([tmp_path])
    assert len(results) == 1 and warning.startswith(f"{tmp_path / 'bad' / 'score.json'}: left out")
    assert says in warning


def test_missing_folders_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_results([tmp_path / "none"])

"""Reading score.json files: old and new names, servers' scores, duplicates, and files that cannot be used."""

from __future__ import annotations

import json
import os

import pytest

from helpers.score_files import CHECKPOINT, write_score
from llava.eval.benchmarks import Score
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
    assert result.card.score is None and "server.json: left out, not a score" in warnings[0]


@pytest.mark.parametrize("name", ["score.json", "server.json"])
def test_answers_complete_a_score(tmp_path, name):
    """A server's score may be next to the answers alone."""
    metadata = {"model": CHECKPOINT, "method": "vispruner", "tokens": 64, "important_ratio": 0.5}
    metadata |= {"visual_tokens": 112, "dtype": "float16"}
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question_id": 1, "metadata": metadata}) + "\n")
    (tmp_path / name).write_text('{"benchmark": "vqav2", "score": 72.5}')
    (result,), warnings = read_results([tmp_path])
    card = result.card
    assert warnings == [] and (card.model, card.benchmark, card.score) == (CHECKPOINT, "vqav2", 72.5)
    assert (card.method, card.tokens, card.important_ratio) == ("vispruner", 64, 0.5)
    assert (card.visual_tokens, card.dtype) == (112, "float16")  # held against the row of a table


def test_the_published_preset_wins_over_newer_files_without_it(tmp_path):
    """The ablation of the tower's dtype is of the same setting as the evaluation, below the same folder."""
    write_score(tmp_path / "pope", "pope", 80.0, preset="published")
    write_score(tmp_path / "ablation", "pope", 79.0, preset="exact", tower_dtype="float16")
    (result,), warnings = read_results([tmp_path])
    assert result.card.score == 80.0 and "and is of the published preset" in warnings[0]


def test_full_sets_win_over_parts_and_new_files_over_old(tmp_path):
    write_score(tmp_path / "b", "pope", 80.0, answers=8910)
    write_score(tmp_path / "a", "pope", 90.0, answers=120)  # newer, but a part of the set
    (result,), warnings = read_results([tmp_path])
    assert result.card.score == 80.0 and "left out (90.00)" in warnings[0] and "complete" in warnings[0]
    write_score(tmp_path / "c", "pope", 81.0, answered=8910)
    (result,), warnings = read_results([tmp_path, tmp_path / "c" / "score.json"])
    assert result.card.score == 81.0 and len(warnings) == 2 and any("is newer" in one for one in warnings)


GOOD = {
    **{"benchmark": "pope", "score": 1, "method": "vispruner", "model": "m", "tokens": 64},
    **{"important_ratio": 0.5, "answered": 8910, "ci_low": 0.5, "ci_high": 1.5, "visual_tokens": 64.0},
    **{"speed": {"questions_per_second": 3.5}, "prefill": {"shape": [2, 64, 99, None], "text_tokens": 9}},
    **{"details": {"average_score": 3.5}, "failures": [], "dtype": "float16", "temperature": 0},
}


def left_out(folder, content, name="score.json"):
    """Return the warning about a file with this content, beside a good one."""
    write_score(folder / "good", "pope", 80.0)
    (folder / "bad").mkdir()
    (folder / "bad" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    results, (warning,) = read_results([folder])
    assert len(results) == 1 and warning.startswith(f"{folder / 'bad' / name}: left out, ")
    assert warning.count(str(folder)) == 1 and "\n" not in warning
    return warning


@pytest.mark.parametrize("name", ["score.json", "server.json"])
@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not a JSON document"),
        ("", "not a JSON document"),
        (b"\xff\xfe\xfa", "not a JSON document"),
        ("[" * 100_000, "not a JSON document"),
        ("[1]", "not a score of a benchmark"),
        ("null", "not a score of a benchmark"),
        ('{"score": 1}', "not a score of a benchmark"),
        ('{"benchmark": "nope", "score": 1}', "unknown benchmark 'nope'"),
        ('{"benchmark": ["pope"], "score": 1}', "unknown benchmark ['pope']"),
        ('{"benchmark": "pope", "score": 1, "method": "none"}', "no model and no tokens"),
    ],
)
def test_unusable_results_are_named_and_left_out(tmp_path, content, says, name):
    assert says in left_out(tmp_path, content, name)


@pytest.mark.parametrize(
    "key, values",
    [
        (
            "score",
            ["NaN", "Infinity", "-Infinity", "1e999", '"1"', "true", "-1", "100.5", "[1]", "{}", "9" * 400],
        ),
        ("tokens", ['"64"', "6.5", "-1", "true", "NaN", "[64]"]),
        ("important_ratio", ['"0.5"', "NaN", "1.5", "-0.5", "false"]),
        ("model", ["7", "null", "[]"]),
        ("method", ["7", "{}"]),
        ("answered", ['"8910"', "NaN", "-1", "0.5", "true"]),
        ("ci_low", ['"0.5"', "NaN", "[0]"]),
        ("low", ["NaN"]),
        ("visual_tokens", ['"64"', "Infinity"]),
        ("llm_gflops", ['"1"', "NaN", "{}"]),
        ("speed", ["[1]", '{"questions_per_second": "3"}', '{"questions_per_second": NaN}']),
        ("prefill", ["[1]", '{"shape": "big"}', '{"shape": [1, "2", 3, 4]}', '{"shape": [2, 64, 99, 32]}']),
        ("details", ["[1]", '"x"', '{"average_score": NaN}', '{"average_score": 6}']),
        ("failures", ['"x"', "3"]),
        ("dtype", ["16", "[]"]),
        ("temperature", ['"0"', "NaN"]),
    ],
)
def test_every_entry_is_validated(tmp_path, key, values):
    """NaN was printed as a number; texts and infinities ended the command after it had written files."""
    good = {name: value for name, value in GOOD.items() if (name, key) != ("ci_low", "low")}
    for place, value in enumerate(values):
        content = json.dumps({**good, key: "VALUE"}).replace('"VALUE"', value)
        if value == "null":
            content = json.dumps({name: one for name, one in good.items() if name != key})
        warning = left_out(tmp_path / str(place), content)
        assert key in warning
        path = tmp_path / str(place) / "bad" / "score.json"
        if value != "null":
            with pytest.raises(DataError, match=r"score\.json: "):
                Scorecard.read(path)
    path.write_text(json.dumps(good))
    results, warnings = read_results([path])
    assert len(results) == 1 and warnings == []


def test_points_of_mme_may_be_above_100(tmp_path):
    write_score(tmp_path, "mme", 1500.5)
    assert read_results([tmp_path])[0][0].card.score == 1500.5
    assert "from 0 to 2800" in left_out(
        tmp_path / "x", json.dumps({**GOOD, "benchmark": "mme", "score": 2801})
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"tokens": None}, "null, which means all"),
        ({"method": "none"}, "'none' keeps all"),
        ({"important_ratio": None}, "no important_ratio"),
    ],
)
def test_settings_that_contradict_themselves(tmp_path, changes, says):
    """They would stand in the row of another setting."""
    assert says in left_out(tmp_path, json.dumps({**GOOD, **changes}))


@pytest.mark.parametrize(
    "key, value", [("tokens", 32), ("dtype", "float32"), ("model", "n"), ("conv_mode", "v0")]
)
def test_scores_are_held_against_the_answers_beside_them(tmp_path, key, value):
    metadata = {**GOOD, "conv_mode": "vicuna_v1"}
    (tmp_path / "bad").mkdir()
    answer = {"question_id": 1, "metadata": metadata}
    (tmp_path / "bad" / "answers.jsonl").write_text(json.dumps(answer))
    (tmp_path / "bad" / "score.json").write_text(json.dumps(metadata))
    assert read_results([tmp_path])[1] == []
    (tmp_path / "bad" / "score.json").write_text(json.dumps({**metadata, key: value}))
    (warning,) = read_results([tmp_path])[1]
    assert f"{key} is {value!r}, but {metadata[key]!r} in the answers beside it" in warning


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"benchmark": "gqa", "score": 50}', "it is about gqa, score.json about vqav2"),
        ('{"benchmark": "vqav2", "score": NaN}', "score is nan"),
        ('{"benchmark": "vqav2", "score": "72.5"}', "score is '72.5'"),
        ('{"score": true}', "score is True"),
        ('{"score": null}', "its score is null"),
        ("[72.5]", 'not {"benchmark": NAME, "score": NUMBER}'),
        ("{", "not a JSON document"),
    ],
)
def test_server_scores_of_another_benchmark_and_no_numbers(tmp_path, content, says):
    write_score(tmp_path, "vqav2", None)
    (tmp_path / "server.json").write_text(content)
    (result,), (warning,) = read_results([tmp_path])
    assert (
        result.card.score is None and says in warning and warning.startswith(f"{tmp_path / 'server.json'}: ")
    )


def test_a_run_with_a_limit_is_not_a_full_set(tmp_path):
    write_score(tmp_path, "mmvet", 30.0, limit=8, answered=8)
    assert not read_results([tmp_path])[0][0].full_set


def test_scorecards_have_the_configuration_of_the_answers():
    metadata = {"model": "m", "method": "none", "tokens": None, "dtype": "float16", "tower_dtype": "float32"}
    metadata |= {
        "conv_mode": "vicuna_v1",
        "temperature": 0.0,
        "num_beams": 1,
        "weights": "ab",
        "preset": "published",
    }
    rows = [{"metadata": {**metadata, "visual_tokens": count}} for count in (10, 20)] + [
        {"text": "no metadata"}
    ]
    card = Scorecard.of(Score("pope", 50.0, {}, []), rows)
    document = card.document()
    assert {**document, **metadata} == document and card.visual_tokens == 15 and card.answered == 3
    assert Scorecard.of_document(document) == card
    rows[0]["metadata"]["dtype"] = "bfloat16"
    card = Scorecard.of(Score("pope", 50.0, {}, []), rows)
    assert card.dtype is None and "different dtype ('bfloat16', 'float16')" in card.details["warnings"][0]


def test_missing_folders_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_results([tmp_path / "none"])


@pytest.mark.parametrize("key", ["model", "method"])
def test_a_score_of_an_unnamed_setting_is_left_out(tmp_path, key):
    write_score(tmp_path, "pope", 80.0, **{key: None})
    results, (warning,) = read_results([tmp_path])
    assert results == [] and f"it has no {key}" in warning


def test_pipes_and_hidden_folders_are_left_out(tmp_path):
    write_score(tmp_path / "pope", "pope", 80.0)
    write_score(tmp_path / ".ipynb_checkpoints", "pope", 12.0)
    os.mkfifo(tmp_path / "pope" / "answers.jsonl")
    for name in ("score.json", "server.json"):
        (tmp_path / name[:-5]).mkdir()
        os.mkfifo(tmp_path / name[:-5] / name)
    (result,), warnings = read_results([tmp_path])
    assert result.card.score == 80.0
    assert len(warnings) == 2 and all("left out, a pipe" in warning for warning in warnings)


def test_a_server_score_of_another_setting_or_beside_a_local_one_is_named(tmp_path):
    write_score(tmp_path, "mmbench", 60.0)
    (tmp_path / "server.json").write_text('{"score": 61, "tokens": 32}')
    (result,), (warning,) = read_results([tmp_path])
    assert (
        result.card.score == 60.0 and "server.json: left out, its tokens is 32, 64 in score.json" in warning
    )
    (tmp_path / "server.json").write_text('{"score": 61}')
    (result,), (warning,) = read_results([tmp_path])
    assert result.card.score == 61 and "its score 61 is used, not 60 of score.json" in warning


def test_doubtful_scores_are_shown_with_a_warning(tmp_path):
    details = {"warnings": ["random: 9 answers, 9 labels. This score is not valid", 5]}
    write_score(tmp_path, "pope", 66.67, answered=8910, unreadable=4000, empty=20, details=details)
    (result,), _ = read_results([tmp_path])
    (warning,) = build_paper_table(load_published()["llava-1.5-7b"], [result]).warnings
    assert "4020 of 8910 answers are empty or not read" in warning and "not valid" in warning

"""Budgets of clips: pooled exact matches, intervals, paired differences, wrong arguments."""

from __future__ import annotations

import json

import pytest

from llava.analysis import clip_budgets
from llava.eval import sweep
from llava.eval.benchmarks import get_benchmark
from llava.eval.jobs.job import setting_name
from llava.paths import BUNDLED_CLIPS


@pytest.fixture
def answered(monkeypatch):
    """A sweep that answers rightly over the clip; per frame, at 114 tokens, only the first half."""

    def main(argv):
        args = sweep.build_parser().parse_args(argv)
        for name in args.benchmarks:
            benchmark = get_benchmark(name)
            truth = benchmark.truth(benchmark.locate(BUNDLED_CLIPS))
            for pruner in sweep.grid(args.methods, args.tokens, args.ratios, 0):
                folder = args.output / name / setting_name(pruner)
                folder.mkdir(parents=True)
                half = args.clip_budget == "total" and pruner.tokens == 114
                rows = [
                    {"question_id": key, "text": entry["answer"] if not half or 2 * n < len(truth) else "?"}
                    for n, (key, entry) in enumerate(truth.items())
                ]
                (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    monkeypatch.setattr(sweep, "main", main)


def test_settings_are_compared(answered, tmp_path, capsys):
    given = ["--benchmarks", "msvd,activitynet", "--tokens", "227,114", "--methods", "vispruner"]
    assert clip_budgets.main([*given, "--ratios", "0.5", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    document = json.loads(said.splitlines()[-1])
    assert document == json.loads((tmp_path / "out" / "clip_budgets.json").read_text())
    assert (document["questions"], document["clips"]) == (1000, 100)
    found = {(one["budget"], one["tokens"]): one for one in document["settings"]}
    assert set(found) == {("", None), ("frame", 227), ("frame", 114), ("clip", 227), ("clip", 114)}
    assert found["frame", 114]["exact_match"] == 50 and found["clip", 114]["exact_match"] == 100
    assert found["frame", 114]["ci_low"] < 50 < found["frame", 114]["ci_high"]
    differences = {one["tokens"]: one for one in document["paired"]}
    assert differences[114]["difference"] == 50 and differences[114]["significant"]
    assert differences[227]["difference"] == 0 and not differences[227]["significant"]
    first = document["beginnings"][0]
    assert first["beginning"] == "is there" and 50 <= first["constant"] < 60
    assert first["exact_match"]["none"] == 100
    assert "A budget over the clip minus one per frame" in said


def test_arguments_are_checked(tmp_path, capsys):
    for given, says in ((["--benchmarks", "pope"], "pope: not a video set"), (["--methods", "x"], "'x'")):
        with pytest.raises(SystemExit):
            clip_budgets.main([*given, "--output", str(tmp_path)])
        assert says in capsys.readouterr().err

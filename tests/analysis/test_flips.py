"""Two answer files side by side: which questions are shown, with what, and clear errors."""

import json
from pathlib import Path

import pytest
from PIL import Image

from helpers.synthetic_pope import make_pope
from llava.analysis import flips, overlay
from llava.eval.benchmarks import DataError
from llava.eval.run import main as evaluate

MODEL = str(Path(__file__).parents[1] / "data" / "model" / "ckpt_llava15s")
QUESTIONS = "llava_pope_test.jsonl"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """POPE with four questions, and the runs of three settings."""
    folder = tmp_path_factory.mktemp("flips")
    data, found = make_pope(folder / "pope", pictures=2, per_category=2), {}
    for method, tokens in (("vispruner", "16"), ("random", "4"), ("fastv", "8"), ("none", "none")):
        given = ["--benchmark", "pope", "--data", data, "--model", MODEL, "--output-dir", folder / "out"]
        given += ["--method", method, "--tokens", tokens, "--max-new-tokens", 2, "--device", "cpu"]
        assert evaluate(list(map(str, given))) == 0
        (found[method],) = (folder / "out" / "pope").glob(f"*/{method}*")
    return data / QUESTIONS, found


def show(capsys, questions, a, b, *more, code=0):
    given = ["--question-file", questions, "--answers", a, b, "--model", MODEL, "--width", 64, *more]
    assert overlay.main([str(one) for one in given]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err


def edited(folder, run, edit):
    """A copy of a run's answers; edit(number, row) changes each row."""
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        edit(number, row)
    path = folder / "edited.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_only_questions_with_different_answers_are_shown(runs, tmp_path, capsys):
    questions, found = runs
    a = edited(tmp_path, found["vispruner"], lambda number, row: row.update(text=["Yes", "No"][number % 2]))
    (tmp_path / "b").mkdir()
    b = edited(tmp_path / "b", found["random"], lambda number, row: row.update(text="Yes "))
    output = tmp_path / "sheet.png"
    document = show(capsys, questions, a, b, "--only-flips", "--output", output)
    assert (document["questions"], document["flips"]) == (3, 3)  # every second of six; "Yes " is "Yes"
    assert (document["a"]["method"], document["a"]["tokens"]) == ("vispruner", 16)
    for one in document["shown"]:
        assert (one["a"]["answer"], one["b"]["answer"]) == ("No", "Yes ")
        assert (one["a"]["kept"], one["b"]["kept"]) == (16, 4)
        assert {one["a"]["credit"], one["b"]["credit"]} == {0.0, 1.0}  # by the labels beside the questions
    assert Image.open(output).width == 460  # the least
    every = show(capsys, questions, a, b, "--output", output, "--limit", "1")
    assert (every["questions"], every["flips"], len(every["shown"])) == (6, 3, 1)
    none = show(capsys, questions, a, a, "--only-flips", "--output", tmp_path / "no.png")
    assert (none["questions"], none["output"]) == (0, None) and not (tmp_path / "no.png").exists()


def test_methods_inside_the_decoder_and_runs_without_pruning(runs, tmp_path, capsys):
    questions, found = runs
    document = show(capsys, questions, found["fastv"], found["none"], "--output", tmp_path / "s.png")
    assert {(one["a"]["kept"], one["b"]["kept"]) for one in document["shown"]} == {(8, 64)}
    assert document["a"]["method"] == "fastv"


@pytest.mark.parametrize("edit, expected", [
    (lambda number, row: row.pop("metadata"), "no metadata"),
    (lambda number, row: row.update(question_id=77), ":1: answers question_id 77"),
    (lambda number, row: row["metadata"].update(index=99), "question number 99"),
    (lambda number, row: row["metadata"].update(method="nonsense"), "unknown pruning method 'nonsense'"),
    (lambda number, row: row["metadata"].update(tokens=-1), "tokens must be 0 or more"),
    (lambda number, row: row["metadata"].update(colour="red"), "has no option colour"),
    (lambda number, row: row["metadata"].update(config=str(number)), "answers of 6 configurations"),
    (lambda number, row: row["metadata"].update(weights="other"), "weights is 'other'"),
])  # fmt: skip
def test_answers_that_cannot_be_shown(edit, expected, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overlay, "_load", lambda *_, **__: pytest.fail("loaded a model"))
    questions, found = runs
    path = edited(tmp_path, found["random"], edit)
    said = show(capsys, questions, found["vispruner"], path, code=1)
    assert said.startswith("error: ") and expected in said and "edited.jsonl" in said


def test_another_checkpoint_or_question_file_is_refused(runs, tmp_path, capsys):
    questions, found = runs
    with pytest.raises(DataError, match="not question number"):
        asked = flips.read_asked(make_pope(tmp_path / "pope", 2, 3) / QUESTIONS, None)
        flips.read_answer_set(found["random"], asked)
    said = show(capsys, questions, found["vispruner"], found["random"],
                "--model", MODEL.replace("15s", "15"), code=1)  # fmt: skip
    assert "ckpt_llava15" in said and "--model" in said
    assert "no such question file" in show(capsys, tmp_path / "q", found["none"], found["none"], code=1)


@pytest.mark.parametrize("arguments, expected", [
    ([], "neither"),
    (["--image", "a.png", "--answers", "a", "b"], "both"),
    (["--answers", "a", "b"], "--question-file: missing"),
    (["--answers", "a", "b", "--question-file", "q", "--tokens", "3"], "--tokens: the answers' metadata"),
    (["--image", "a.png", "--only-flips"], "--only-flips: only with --answers"),
])  # fmt: skip
def test_arguments_that_do_not_go_together(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        overlay.main(arguments)
    assert expected in capsys.readouterr().err

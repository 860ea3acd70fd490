"""The figures' command: files, data, resumption, errors before a model is loaded."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from helpers import golden_analysis
from helpers.synthetic_pope import make_pope
from llava.analysis.attention import Records
from llava.analysis.figures import __main__ as figures
from llava.analysis.figures import drawing, fig2, fig3
from llava.pruning import list_pruners

DATA = Path(__file__).parents[2] / "data"
MODEL = DATA / "model" / "ckpt_llava15s"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A question file in LLaVA's training format, with its images beside it."""
    folder, source = tmp_path_factory.mktemp("mix"), DATA / "analysis" / "questions_v15s.jsonl"
    images = json.loads((DATA / "analysis" / "analysis.json").read_text(encoding="utf-8"))["images"]
    golden_analysis.write_images(images, golden_analysis.read_question_file(source, folder, []))
    (folder / "mix.jsonl").write_bytes(source.read_bytes())
    return folder / "mix.jsonl"


@pytest.fixture
def no_pictures(monkeypatch):
    """Write the data only: rendering takes seconds."""
    monkeypatch.setattr(drawing, "render", lambda *_: {})


def run(capsys, *arguments, code=0):
    assert figures.main([str(one) for one in arguments]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]) if code == 0 or printed.out else printed.err


def of_questions(questions, output, *more):
    named = ["--model", MODEL, "--question-file", questions, "--image-folder", questions.parent]
    return [*named, "--output", output, "--conv-mode", "vicuna_v1", "--device", "cpu", *more]


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_both_figures_of_a_question_file(questions, tmp_path, capsys):
    found = run(capsys, "fig2", *of_questions(questions, tmp_path, "--benchmarks", "none"))
    names = ["fig2.png", "fig2.svg", "fig2.md", "frequency.csv", "quartiles.csv"]
    assert [Path(file).name for file in found["files"]] == names
    assert (found["samples"], found["computed"], found["layers"], found["visual_tokens"]) == (6, 6, 3, 64)
    assert (
        "6 questions of mix.jsonl" in found["caption"]
        and "3 layers" in found["caption"]
        and "cannot show" in found["caption"]
    )
    assert (tmp_path / "fig2" / "fig2.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "fig2" / "fig2.svg").read_text(encoding="utf-8")
    assert "share of the selected tokens" in svg and "last quarter" in svg  # text stays text
    rows = read(tmp_path / "fig2" / "quartiles.csv")
    wanted = json.loads((DATA / "analysis" / "analysis.json").read_text())["groups"]["v15s"]
    ours = [[float(row[f"q{part}"]) for part in range(1, 5)] for row in rows if row["source"] == "ours"]
    np.testing.assert_allclose(ours, wanted["quartiles"]["last"]["proportion"], atol=1e-8)
    assert sum(row["source"] == "published" for row in rows) == 32

    found = run(capsys, "fig3", *of_questions(questions, tmp_path, "--benchmarks", "none"))
    assert (found["samples"], found["computed"]) == (6, 0)  # those of the other figure
    rows = read(tmp_path / "fig3" / "densities.csv")
    counts = [int(row["count"]) for row in rows if (row["kind"], row["layer"]) == ("cls", "tower")]
    assert counts == wanted["dispersion"]["cls"][0]["counts"]
    (row,) = [row for row in read(tmp_path / "fig3" / "entropy.csv") if row["kind"] == "cls"]
    assert float(row["entropy_nats"]) == pytest.approx(
        wanted["dispersion"]["cls"][0]["entropy_mean"], abs=5e-5
    )


def test_a_stopped_run_resumes_with_the_same_numbers(questions, tmp_path, capsys, monkeypatch, no_pictures):
    whole = of_questions(questions, tmp_path / "whole", "--benchmarks", "none")
    run(capsys, "fig3", *whole)
    append, budget = Records.append, iter(range(3))

    def stop(self, index, sample):
        next(budget)
        append(self, index, sample)

    stopped = of_questions(questions, tmp_path / "stopped", "--benchmarks", "none")
    with monkeypatch.context() as patch:
        patch.setattr(Records, "append", stop)
        with pytest.raises(StopIteration):
            figures.main(["fig3", *map(str, stopped)])
    capsys.readouterr()
    assert run(capsys, "fig3", *stopped)["computed"] == 3
    for file in (tmp_path / "whole" / "fig3").iterdir():
        assert file.read_bytes() == (tmp_path / "stopped" / "fig3" / file.name).read_bytes(), file.name
    fewer = run(capsys, "fig3", *stopped, "--num-questions", "2")
    assert (fewer["samples"], fewer["computed"]) == (2, 0)


@pytest.mark.parametrize("figure", ["fig2", "fig3"])
def test_scores_inside_the_decoder(figure, questions, tmp_path, capsys, no_pictures):
    pope = make_pope(tmp_path / "pope", pictures=2, per_category=2)
    given = of_questions(questions, tmp_path / "out", "--benchmarks", "pope", "--data", pope, "--limit", 4)
    given += ["--num-questions", 2, "--max-new-tokens", 3]
    found = run(capsys, figure, *given)
    assert found["benchmarks"] == {"pope": 4}
    name = "quarters" if figure == "fig2" else "budget"
    ours = [row for row in read(tmp_path / "out" / figure / f"{name}.csv") if row["source"] == "ours"]
    assert all(0 <= float(row["ci_low"]) <= float(row["ci_high"]) <= 100 for row in ours)
    if figure == "fig2":
        settings = {(row["layer"], row["quarter"]) for row in ours}
        assert settings == {("", "all"), *((str(la), str(q)) for la in range(3) for q in range(4))}
    else:
        assert [(row["kind"], row["layer"], row["tokens"]) for row in ours] == [
            ("all", "", ""),
            *((kind, "1", "14") for kind in ("cls", "last", "equi_last", "random")),  # 128 of 576, of 64
        ]
    runs = list((tmp_path / "out" / "runs").rglob("answers.jsonl"))
    assert len(runs) == len(ours) and not list((tmp_path / "out").rglob("score.json"))
    before = {path: path.read_bytes() for path in (tmp_path / "out" / figure).iterdir()}
    assert run(capsys, figure, *given)["failures"] == []
    assert before == {path: path.read_bytes() for path in before}


def test_a_broken_image_is_reported_and_its_question_left_out(questions, tmp_path, capsys, no_pictures):
    for file in questions.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "d123x57.png").write_bytes(b"no image")
    given = of_questions(tmp_path / "mix.jsonl", tmp_path / "out", "--benchmarks", "none")
    assert figures.main(["fig2", *map(str, given)]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert "--max-failures is 0" in run(capsys, "fig2", *given, "--max-failures", "0", code=1)
    assert found["samples"] == 5 and "mix.jsonl:4" in printed.err and "d123x57.png" in found["failures"][0]


@pytest.mark.parametrize("line, expected", [
    ('{"id": 1, "image": "a.png", "conversations": []}', "first turn"),
    ('{"id": 1, "image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}', "expected 'human'"),
    ('{"image": "a.png", "conversations": [{"from": "human", "value": "x"}]}', "'id'"),
    ('{"id": 1, "conversations": [{"from": "human", "value": "x"}]}', "no image"),
    ('{"id": 1, "image": "../a.png", "conversations": [{"from": "human", "value": "x"}]}', "outside"),
    ('{"question_id": 1, "image": "a.png"}', "'text'"),
])  # fmt: skip
def test_unusable_questions_are_named(line, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "collect", lambda *_: pytest.fail("loaded a model"))
    (tmp_path / "mix.jsonl").write_text(line + "\n", encoding="utf-8")
    given = of_questions(tmp_path / "mix.jsonl", tmp_path / "out", "--benchmarks", "none")
    said = run(capsys, "fig2", *given, code=1)
    assert "mix.jsonl:1" in said and expected in said


def test_errors_before_a_model_is_loaded(questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "collect", lambda *_: pytest.fail("loaded a model"))
    with pytest.raises(SystemExit):
        run(capsys, "fig2", "--benchmarks", "pope,nonsense")
    assert "'nonsense'" in capsys.readouterr().err
    monkeypatch.setattr(drawing, "find_spec", lambda _: None)
    assert "vispruner[plot]" in run(capsys, "fig2", *of_questions(questions, tmp_path), code=1)


def test_layers_are_scaled_to_the_depth():
    assert [fig2.shown_layer(depth) for depth in (1, 3, 16, 24, 32, 40)] == [0, 0, 0, 1, 1, 2]
    assert drawing.depth_note(32) == "" and "3 layers" in drawing.depth_note(3)
    layers = sorted({one.layer for one in fig2.pruners(32, 1)[1:]})
    assert layers == [4, 8, 12, 16, 20, 24, 28] and len(fig2.pruners(3, 0)) == 13
    assert {one.tokens for one in fig3.pruners(32, 576, 0)[1:]} == {128}


def test_the_settings_are_no_methods():
    assert not {"quarter", "inside"} & set(list_pruners())

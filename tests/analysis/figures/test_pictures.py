"""Figures 1, 4 and 5 end to end: files, data, captions, errors before a model is loaded."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.oracle_vispruner import select_row
from helpers.selection_inputs import make_inputs
from helpers.synthetic_pope import make_pope
from llava.analysis.ablation import __main__ as ablation
from llava.analysis.figures import __main__ as figures
from llava.analysis.figures import drawing, fig1, fig4, fig5
from llava.eval.jobs.session import Session
from llava.eval.run import main as evaluate
from llava.model.features import VisionFeatures
from llava.pruning import get_pruner, list_pruners

DATA = Path(__file__).parents[2] / "data"
MODEL = DATA / "model" / "ckpt_llava15s"


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    return make_pope(tmp_path_factory.mktemp("data") / "pope", pictures=2, per_category=2)


@pytest.fixture
def photo(pope, tmp_path, monkeypatch):
    """A photograph with two questions, of which the file answers one."""
    images = sorted((pope / "val2014").iterdir())
    (tmp_path / "photo.png").write_bytes(images[0].read_bytes())
    asked = {"image": "photo.png", "conversations": [{"from": "human", "value": "<image>\nIs it $5 or $6?"}]}
    reply = {"from": "gpt", "value": "No."}
    rows = [{"id": "a", **asked}, {"id": "b", **asked, "conversations": [*asked["conversations"], reply]}]
    (tmp_path / "photos.json").write_text(json.dumps(rows[::-1]), encoding="utf-8")
    monkeypatch.setattr(fig1, "PHOTOS", tmp_path / "photos.json")
    return tmp_path / "photos.json"


@pytest.fixture
def no_pictures(monkeypatch):
    """Write the data only: rendering takes seconds."""
    monkeypatch.setattr(drawing, "render", lambda *_: {})


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(Session, "engine", lambda *_, **__: pytest.fail("loaded a model"))


def run(capsys, *arguments, code=0):
    assert figures.main([str(one) for one in arguments]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]) if code == 0 or printed.out else printed.err


def given(pope, output, *more):
    return ["--model", MODEL, "--data", pope, "--output", output, "--device", "cpu", *more]


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_kept_patches_and_answers(pope, photo, tmp_path, capsys):
    methods = ["vispruner", "visionzip", "tome", "divprune", "fastv", "cdpruner"]
    short = ["--max-new-tokens", 2, "--conv-mode", "vicuna_v1"]
    found = run(
        capsys, "fig1", *given(pope, tmp_path, "--tokens", 16, "--methods", ",".join(methods), *short)
    )
    names = ["fig1.png", "fig1.svg", "fig1.md", "answers.csv", "patches.csv"]
    assert [Path(file).name for file in found["files"]] == names
    svg = (tmp_path / "fig1" / "fig1.svg").read_text(encoding="utf-8")
    assert "visionzip" in svg and "merged into one token" in svg and "Is it $5 or $6? Truth: No." in svg
    first, second = found["examples"]
    shown = [name for name in ["none", *methods] if name not in found["unavailable"]]
    assert list(first["methods"]) == list(second["methods"]) == shown
    assert found["unavailable"].keys() <= {"cdpruner"}
    assert second["truth"] == "No." and second["question"] == "Is it $5 or $6?"
    for one in first["methods"].values():  # the answers have no yes or no: read as yes by POPE's rule
        assert one["right"] == (first["truth"] == "Yes")
    rows = read(tmp_path / "fig1" / "answers.csv")
    assert [row["tokens"] for row in rows if row["method"] == "vispruner"] == ["16", "16"]
    patches = read(tmp_path / "fig1" / "patches.csv")
    assert sum(row["method"] == "divprune" for row in patches) == 2 * 16
    merged = {
        (row["image"], row["token"]) for row in patches if (row["method"], row["role"]) == ("tome", "merged")
    }
    assert len(merged) == sum(int(row["merged"]) for row in rows if row["method"] == "tome")

    # The same answers as a run
    out = ["--benchmark", "pope", "--output-dir", tmp_path / "runs", *given(pope, "")[:4], *short]
    assert evaluate(list(map(str, [*out, "--method", "visionzip", "--tokens", 16, "--device", "cpu"]))) == 0
    (file,) = (tmp_path / "runs").rglob("answers.jsonl")
    answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    (ours,) = [one["text"] for one in answers if one["question_id"] == first["question_id"]]
    assert first["methods"]["visionzip"]["answer"] == ours


def test_crops_and_every_method(pope, photo, tmp_path, capsys, no_pictures):
    model = str(MODEL).replace("15s", "16s")
    asked = ["--model", model, "--question-file", photo, "--image-folder", photo.parent]
    found = run(capsys, "fig1", *given(pope, tmp_path, "--tokens", 40, "--max-new-tokens", 1), *asked)
    shown = [*found["examples"][0]["methods"], *found["unavailable"]]
    assert sorted(shown) == list_pruners()
    assert found["examples"][0]["methods"]["divprune"]["kept"] == 5 * 40
    found = run(capsys, "fig4", *given(pope, tmp_path), *asked)
    assert found["tokens"] == 64 and "first crop" in found["caption"] and len(found["images"]) == 1


def test_the_selection_step_by_step():
    features, attention = map(torch.from_numpy, make_inputs("cluster", 5, 1, 60, 8, 2))
    vision = VisionFeatures(features, attention, None, ["a"])
    for tokens, ratio in ((20, 0.5), (20, 1.0), (20, 0.0), (60, 0.5), (59, 0.5)):
        found = fig4.trace(vision, get_pruner("vispruner", tokens, ratio))
        kept, important = select_row(features[0].numpy(), attention[0].numpy(), tokens, ratio)
        assert found.kept.tolist() == kept and set(found.important.tolist()) == important
        gone = np.flatnonzero(found.removed_in)
        assert sorted([*gone.tolist(), *kept]) == list(range(60))
        assert len(found.rounds) - 1 == found.removed_in.max(initial=0)
    assert fig4.shown_rounds(64) == [1, 22, 43, 64] and fig4.shown_rounds(2) == [1, 2]
    assert fig4.shown_rounds(0) == []


def test_selection_of_images(pope, photo, tmp_path, capsys):
    asked = ["--question-file", photo, "--image-folder", photo.parent, "--tokens", 20, "--ratio", 0.25]
    found = run(capsys, "fig4", *given(pope, tmp_path, *asked))
    assert [Path(file).name for file in found["files"]] == ["fig4.png", "fig4.svg", "fig4.md", "patches.csv",
                                                            "rounds.csv"]  # fmt: skip
    assert [one["image"] for one in found["images"]] == ["photo.png"]
    rounds = [row for row in read(tmp_path / "fig4" / "rounds.csv") if row["image"] == "photo.png"]
    assert [(row["before"], row["after"]) for row in rounds] == [
        ("59", "51"), ("51", "43"), ("43", "35"), ("35", "27"), ("27", "19"), ("19", "15"),
    ]  # fmt: skip
    fates = [row["fate"] for row in read(tmp_path / "fig4" / "patches.csv") if row["image"] == "photo.png"]
    assert (fates.count("important"), fates.count("diverse"), fates.count("removed")) == (5, 15, 44)


def test_components_are_those_of_the_ablation(pope, tmp_path, capsys, monkeypatch):
    arguments = given(
        pope, tmp_path / "out", "--benchmarks", "pope", "--tokens", "9,4", "--max-new-tokens", 2
    )
    arguments += ["--ablation", tmp_path / "ablation", "--bootstrap-iters", 100]
    found = run(capsys, "fig5", *arguments)
    assert [Path(file).name for file in found["files"]] == ["fig5.png", "fig5.svg", "fig5.md", "scores.csv"]
    rows = read(tmp_path / "out" / "fig5" / "scores.csv")
    assert [(row["tokens"], row["value"]) for row in rows] == [
        (tokens, value) for tokens in ("9", "4") for value in fig5.STYLES
    ]
    ours = (tmp_path / "ablation" / "components" / "components.csv").read_text(encoding="utf-8")
    assert [row["score"] for row in rows] == [row["score"] for row in csv.DictReader(ours.splitlines())]
    monkeypatch.setattr(Session, "engine", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setattr(drawing, "render", lambda *_: {})
    assert run(capsys, "fig5", *arguments)["rows"] == found["rows"]


def test_an_ablation_without_scores_is_an_error(pope, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fig5, "run_ablation", lambda argv: (1, {"rows": []}))
    said = run(capsys, "fig5", *given(pope, tmp_path), "--ablation", tmp_path, code=1)
    assert "the ablation has no scores" in said
    assert set(fig5.STYLES) == set(ablation.ABLATIONS[fig5.NAME].values)


@pytest.mark.parametrize("arguments, expected", [
    (["fig1", "--methods", "vispruner,nonsense"], "'nonsense': no such method"),
    (["fig1", "--methods", "none"], "'none': no such method"),
    (["fig1", "--methods", ","], "no method"),
    (["fig1", "--benchmarks", "pope"], "--benchmarks"),
    (["fig4", "--ratio", "2"], "--ratio"),
    (["fig4", "--tokens", "0"], "--tokens"),
    (["fig5", "--tokens", ","], "--tokens and --benchmarks"),
    (["fig6"], "fig6"),
    ([], "FIGURE"),
])  # fmt: skip
def test_arguments_are_checked_first(arguments, expected, capsys, no_model):
    with pytest.raises(SystemExit) as stopped:
        figures.main(arguments)
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


def test_help_describes_one_figure(capsys):
    for name in ("fig1", "fig4", "fig5"):
        with pytest.raises(SystemExit) as stopped:
            figures.main([name, "--help"])
        assert stopped.value.code == 0 and "--tokens" in capsys.readouterr().out


def test_methods_that_cannot_run_are_left_out(pope, photo, tmp_path, capsys, no_pictures):
    """With newlines, merged tokens have no rows: the others are shown, and the reason is told."""
    asked = ["--question-file", photo, "--image-folder", photo.parent, "--tokens", 9, "--max-new-tokens", 1]
    crops = ["--model", str(MODEL).replace("15s", "16s"), "--anyres", "llava"]
    arguments = given(pope, tmp_path, *asked, *crops)
    found = run(capsys, "fig1", *arguments, "--methods", "tome,vispruner")
    assert list(found["examples"][0]["methods"]) == ["none", "vispruner"]
    assert "anyres='paper'" in found["unavailable"]["tome"] and "tome" in found["caption"]


def test_an_unreadable_image_is_named(pope, photo, tmp_path, capsys, no_pictures):
    (tmp_path / "photo.png").write_bytes(b"no image")
    asked = given(pope, tmp_path, "--question-file", photo, "--image-folder", photo.parent)
    for figure in ("fig1", "fig4"):
        said = run(capsys, figure, *asked, code=1)
        assert said.startswith("error: ") and "photo.png" in said


def test_labels_that_are_missing_leave_the_truth_open(pope, tmp_path, capsys, monkeypatch, no_pictures):
    shutil.copytree(pope, tmp_path / "pope")
    shutil.rmtree(tmp_path / "pope" / "coco")
    monkeypatch.setattr(fig1, "PHOTOS", tmp_path / "none.json")
    asked = given(tmp_path / "pope", tmp_path, "--methods", "random", "--tokens", 0, "--max-new-tokens", 1)
    (one,) = run(capsys, "fig1", *asked)["examples"]
    assert one["truth"] is None and one["methods"]["random"]["right"] is None
    assert one["methods"]["random"]["kept"] == 0

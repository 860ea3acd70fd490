"""Ablations end to end on small checkpoints: tables, files, resuming, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.synthetic_pope import make_pope
from llava.analysis.ablation import __main__ as ablation
from llava.analysis.ablation.agreement import accuracy_where, changed_answers, kept_iou
from llava.analysis.ablation.definitions import ABLATIONS
from llava.eval.benchmarks import QuestionScore
from llava.eval.jobs.job import setting_name
from llava.pruning import get_pruner

ROOT = Path(__file__).parents[3]
MODELS = ROOT / "tests" / "data" / "model"
OF_THE_ISSUE = "ratio components cue_layer cue similarity drop order positions crops dtype"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_pope(root / "pope", pictures=2, per_category=6)
    return root


def run(data: Path, output: Path, name: str, *more: str, model: str = "ckpt_llava15s") -> int:
    common = ["--benchmarks", "pope", "--model", str(MODELS / model), "--data", str(data)]
    common += ["--output", str(output), "--max-new-tokens", "2", "--bootstrap-iters", "100"]
    return ablation.main([name, *common, "--num-workers", "0", *more])


def last(capsys) -> tuple[dict, str]:
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.out + captured.err


# -- definitions ----------------------------------------------------------------------------------


def test_every_ablation_has_a_script_and_a_page():
    scripts = {path.stem: path.read_text("utf-8") for path in (ROOT / "scripts" / "ablation").glob("*.sh")}
    assert set(scripts) == set(ABLATIONS) and set(OF_THE_ISSUE.split()) <= set(ABLATIONS)
    page = (ROOT / "docs" / "ablations.md").read_text("utf-8")
    for name, one in ABLATIONS.items():
        checkpoint = "llava-v1.6-vicuna-7b" if one.crops else "llava-v1.5-7b"
        assert scripts[name].splitlines()[-1] == f'vispruner_ablation {name} {checkpoint} "$@"'
        assert f"scripts/ablation/{name}.sh" in page


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_default_is_vispruner_and_values_differ(name):
    one = ABLATIONS[name]
    default = one.pruner(one.default, 64)
    assert default.config() == get_pruner("vispruner", 64, 0.5).config()
    labels = [label for group in one.job_options().values() for label in group]
    assert labels[0] == one.default and sorted(labels) == sorted(one.values)
    names = {(setting_name(one.pruner(label, 64)), options) for options, own in one.job_options().items()
             for label in own}  # fmt: skip
    assert len(names) == len(one.values)
    assert not one.numeric or [float(label) for label in one.values]


def test_values_of_the_ablations():
    assert [float(label) for label in ABLATIONS["ratio"].values] == [tenth / 10 for tenth in range(11)]
    assert [ABLATIONS["drop"].pruner(label, 9).drop for label in ABLATIONS["drop"].values] == [
        1, 2, 4, 8, 16, "all"
    ]  # fmt: skip
    made = {label: ABLATIONS["components"].pruner(label, 9) for label in ABLATIONS["components"].values}
    assert {label: (one.name, one.important_ratio) for label, one in made.items()} == {
        "random": ("random", 0.5), "important": ("vispruner", 1.0), "diverse": ("vispruner", 0.0),
        "both": ("vispruner", 0.5),
    }  # fmt: skip


# -- runs -----------------------------------------------------------------------------------------


def test_a_run_its_files_and_its_second_start(data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from llava.model.llava_arch import LlavaMetaForCausalLM

    encode, seen = LlavaMetaForCausalLM.encode_vision, []
    monkeypatch.setattr(
        LlavaMetaForCausalLM,
        "encode_vision",
        lambda self, images, sizes=None, **cues: seen.extend(images) or encode(self, images, sizes, **cues),
    )
    assert run(data, tmp_path, "cue", "--tokens", "8,4", "--limit", "6") == 0
    document, said = last(capsys)
    assert len(seen) == 2  # each image once for all eight settings
    values = [(row["tokens"], row["value"]) for row in document["rows"]]
    assert values == [(tokens, label) for tokens in (8, 4) for label in ABLATIONS["cue"].values]
    assert "Cue of importance: POPE" in said and document["failures"] == []
    for row in document["rows"]:
        assert row["ci_low"] <= row["score"] <= row["ci_high"] and row["visual_tokens"] == row["tokens"]
        assert (row["difference"] is None) == (row["value"] == "[CLS] attention")
    names = ["cue.md", "cue.csv", "cue.html", "cue-pope.svg"]
    files = [tmp_path / "cue" / name for name in names]
    assert document["files"] == [str(path) for path in files]
    assert "<svg" in files[2].read_text() and ">feature norm</text>" in files[3].read_text()
    rows = list(csv.DictReader(files[1].open()))
    assert [float(row["score"]) for row in rows] == [row["score"] for row in document["rows"]]
    answers = tmp_path / "answers" / "ckpt_llava15s" / "pope"
    metadata = json.loads((answers / "vispruner-cue=norm-r0.5-8" / "answers.jsonl").open().readline())[
        "metadata"
    ]
    assert metadata["method"] == "vispruner-cue=norm"

    before = [path.read_bytes() for path in files]
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run(data, tmp_path, "cue", "--tokens", "8,4", "--limit", "6") == 0
    again, said = last(capsys)
    assert "8 settings, 8 already finished" in said
    assert again == document and [path.read_bytes() for path in files] == before
    for path in files:  # tables of a run that was killed before they were written
        path.unlink()
    assert run(data, tmp_path, "cue", "--tokens", "8,4", "--limit", "6") == 0
    assert [path.read_bytes() for path in files] == before


def test_an_interrupted_run_is_resumed_and_ablations_share_answers(data, tmp_path, capsys):
    assert run(data, tmp_path, "order", "--tokens", "6", "--limit", "7") == 0
    document, _ = last(capsys)
    assert {row["questions"] for row in document["rows"]} == {7}
    assert run(data, tmp_path, "order", "--tokens", "6") == 0
    document, _ = last(capsys)
    assert {row["questions"] for row in document["rows"]} == {18}
    assert run(data, tmp_path / "whole", "order", "--tokens", "6") == 0
    whole, _ = last(capsys)
    assert whole["rows"] == document["rows"]
    assert run(data, tmp_path, "similarity", "--tokens", "6") == 0
    assert "3 settings, 1 already finished" in last(capsys)[1]


def test_positions_are_part_of_a_setting(data, tmp_path, capsys):
    assert run(data, tmp_path, "positions", "--tokens", "4", "--limit", "3") == 0
    document, said = last(capsys)
    assert [row["setting"] for row in document["rows"]] == [
        "vispruner-r0.5-4", "vispruner-positions=original-r0.5-4", "none"
    ]  # fmt: skip
    assert "where" not in said.partition("95% CI")[2].partition("Model")[0]  # POPE has no such questions
    files = (tmp_path / "answers" / "ckpt_llava15s" / "pope").glob("*/answers.jsonl")
    entered = {json.loads(path.open().readline())["metadata"]["method"] for path in files}
    assert entered == {"vispruner", "vispruner-positions=original", "none"}


def test_budgets_per_crop_and_per_image(data, tmp_path, capsys):
    assert run(data, tmp_path, "crops", "--tokens", "4", model="ckpt_llava16s") == 0
    document, _ = last(capsys)
    assert [row["value"] for row in document["rows"]] == ["per crop", "per image"]
    assert [row["visual_tokens"] for row in document["rows"]] == [20.0, 20.0]
    with pytest.raises(SystemExit):
        run(data, tmp_path, "crops", "--tokens", "4")
    assert "its images are not cut into crops" in capsys.readouterr().err


def test_towers_are_compared_by_what_they_keep(data, tmp_path, capsys, monkeypatch):
    values = {name: ABLATIONS["dtype"].values[name] for name in ("bfloat16, sdpa", "float32, sdpa")}
    monkeypatch.setitem(ABLATIONS, "dtype", replace(ABLATIONS["dtype"], values=values))
    assert run(data, tmp_path, "dtype", "--tokens", "6") == 0
    document, said = last(capsys)
    other, default = document["rows"]
    assert default["kept IoU"] is None and "kept IoU" in said
    assert 0 < other["kept IoU"]["value"] <= 1 and 0 <= other["changed"]["value"] <= 1
    kept = [
        json.loads((tmp_path / "answers" / f"ckpt_llava15s-{tower}-sdpa" / "pope" / "vispruner-r0.5-6" /
                    "kept.json").read_text())["kept"]
        for tower in ("bfloat16", "float32")
    ]  # fmt: skip
    shares = [
        len(set(a[0]) & set(b[0])) / len(set(a[0]) | set(b[0]))
        for a, b in zip(kept[0].values(), kept[1].values(), strict=True)
    ]
    assert other["kept IoU"]["value"] == pytest.approx(sum(shares) / 2)
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run(data, tmp_path, "dtype", "--tokens", "6") == 0
    assert last(capsys)[0] == document
    with pytest.raises(SystemExit):
        run(data, tmp_path, "dtype", "--tower-dtype", "float16")
    assert "sets tower dtype and kernel itself" in capsys.readouterr().err


def test_what_is_refused(data, tmp_path, capsys):
    for words, message in (
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["ratio", "--tokens", "0"], "--tokens"),
        (["ratio", "--tokens", ""], "must each name at least one"),
        (
            ["ratio", "--benchmarks", "nonsense", "--model", str(MODELS / "ckpt_llava15s")],
            "unknown benchmark",
        ),
        (["ratio", "--benchmarks", "pope,gqa", "--data", str(data / "pope")], "give the folder above"),
    ):
        with pytest.raises(SystemExit) as stopped:
            ablation.main(words)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_slow_ablations_have_a_limit_for_the_bundled_data(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ABLATIONS, "order", replace(ABLATIONS["order"], limit=2, benchmarks=("pope",)))
    asked = []
    monkeypatch.setattr(ablation, "read_tasks", lambda args, *_: asked.append(args.limit) or [])
    model = ["--model", str(MODELS / "ckpt_llava15s"), "--output", str(tmp_path)]
    for words in ([], ["--limit", "7"], ["--data", str(data)]):
        assert ablation.main(["order", *model, *words]) == 1  # no questions
    assert asked == [2, 7, None] and "The first 2 questions are evaluated" in capsys.readouterr().out


def test_default_benchmarks_without_data_are_left_out(data, tmp_path, capsys):
    words = ["components", "--model", str(MODELS / "ckpt_llava15s"), "--data", str(data), "--tokens", "4"]
    words += ["--output", str(tmp_path), "--max-new-tokens", "2", "--num-workers", "0", "--limit", "2"]
    assert ablation.main(words) == 0
    document, said = last(capsys)
    assert "no data of gqa, vqav2_val, left out" in said
    assert {row["benchmark"] for row in document["rows"]} == {"pope"}


# -- numbers --------------------------------------------------------------------------------------


def test_kept_iou_counts_crops_apart():
    a = {"x": [[0, 1], [2, 3]], "y": [[5], [6]]}
    b = {"x": [[0, 1], [2, 4]], "y": [[6], [5]], "z": [[1], [1]]}
    found = kept_iou(a, b, 200, 0)
    assert found.value == pytest.approx((3 / 5 + 0) / 2) and found.ci_low == 0 and found.ci_high == 0.6
    assert kept_iou(a, a, 200, 0) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no image"):
        kept_iou(a, {}, 200, 0)


def test_changed_answers_are_counted_over_common_questions(tmp_path):
    for name, texts in (("a", "yyn"), ("b", "ynn")):
        lines = [json.dumps({"text": text, "metadata": {"index": n}}) for n, text in enumerate(texts)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    asked = [SimpleNamespace(index=index, image=index // 2) for index in range(4)]  # the last has no answer
    found = changed_answers(tmp_path / "a", tmp_path / "b", SimpleNamespace(asked=asked), 200, 0)
    assert found.value == pytest.approx(1 / 3) and (found.ci_low, found.ci_high) == (0.0, 0.5)


def test_the_accuracy_on_questions_about_positions(tmp_path):
    texts = ["Is a to the left of b?", "Is there a plate?", "Where is c?", "Is d above e?"]
    asked = [SimpleNamespace(index=index, text=text) for index, text in enumerate(texts)]
    rows = [{"metadata": {"index": index}} for index in range(3)]  # the last has no answer
    benchmark = SimpleNamespace(
        read_answers=lambda path: rows,
        question_scores=lambda folder, rows: [
            QuestionScore(str(row["metadata"]["index"]), "x", float(row["metadata"]["index"] == 0))
            for row in rows
        ],
    )
    task = SimpleNamespace(asked=asked, benchmark=benchmark, folder=tmp_path)
    assert accuracy_where(task, SimpleNamespace(answers=tmp_path), 200, 0) == (0.5, 0.5, 0.5)
    task.asked = asked[1:2]
    assert accuracy_where(task, SimpleNamespace(answers=tmp_path), 200, 0) is None

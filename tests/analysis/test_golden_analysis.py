"""The attention analysis equals the reference data, and the comparison notices what differs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import golden_analysis
from llava.analysis.figures.kept import KeptByScore, KeptQuarter
from llava.model.decode import Row
from llava.model.inside import prefill

DATA = Path(__file__).parents[1] / "data" / "analysis"
GROUP = "v15s"


@pytest.fixture(scope="module")
def document():
    return json.loads((DATA / "analysis.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reader(document, tmp_path_factory):
    """A reader and its questions, of the group's checkpoint and images."""
    folder, group, issues = tmp_path_factory.mktemp("images"), document["groups"][GROUP], []
    questions = golden_analysis.read_question_file(DATA / group["questions"], folder, issues)
    golden_analysis.write_images(document["images"], questions)
    return golden_analysis.make_reader(DATA, group, questions), questions


def test_the_reference_data_is_reproduced(capsys):
    assert golden_analysis.main([str(DATA)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"cases": 6 + 6 + 5 * 3, "equal": 27, "failed": []}


def test_every_kind_of_difference_is_noticed(document, tmp_path, capsys):
    shutil.copytree(DATA, tmp_path / "analysis")
    group, samples = document["groups"][GROUP], document["samples"]
    changed = json.loads(json.dumps(document))
    groups, cases = changed["groups"][GROUP], changed["samples"]
    cases[0]["prompt"] += " "
    cases[1]["first_new_id"] += 1
    mask = bytearray.fromhex(samples[2]["top_quarter"]["last"][0]["mask"])
    mask[0], mask[-1] = mask[0] ^ 0xFF, mask[-1] ^ 0xFF
    cases[2]["top_quarter"]["last"][0]["mask"] = mask.hex()
    groups["quartiles"]["last"]["proportion"][1][2] += 1e-3
    groups["dispersion"]["last"][0]["cdf"][3] += 1e-4
    groups["dispersion"]["equi_last"][2]["entropy_mean"] += 1e-3
    groups["dispersion"]["cls"][0]["counts"][0] += 2 * group["dispersion"]["cls"][0]["slack"] + 1
    (tmp_path / "analysis" / "analysis.json").write_text(json.dumps(changed), encoding="utf-8")
    with np.load(DATA / "analysis_arrays.npz") as file:
        arrays = {key: file[key].copy() for key in file.files}
    arrays[f"{GROUP}/s4|equi_last"][1, 7] *= 1.001
    arrays[f"{GROUP}|mean_text"][2, 9] *= 1.001
    arrays[f"{GROUP}|count_equi_last"][0, 5] += 1
    np.savez(tmp_path / "analysis" / "analysis_arrays.npz", **arrays)
    assert golden_analysis.main([str(tmp_path / "analysis")]) == 1
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]) == {
        *(f"sample/{GROUP}/s{number}" for number in (1, 2, 3, 4)),
        *(f"{name}/{GROUP}/last" for name in ("quartiles", "cdf")),
        *(f"{name}/{GROUP}/equi_last" for name in ("entropy", "frequency")),
        *(f"{name}/{GROUP}/{kind}" for name, kind in (("mean", "text"), ("density", "cls"))),
    }


def run(reader, question, pruner):
    """Prefill a question with a pruner; return its logits and the visual tokens that are left."""
    model = reader.model
    with torch.inference_mode():
        vision = model.encode_vision([reader._load(question.image)[0][0]])[0]
        tokens = model.visual_tokens(vision, pruner)
        row = Row(reader.engine.prompt_ids(question), tokens.embeds, marked=tokens.kept.important.flatten())
        found = prefill(model, [row], pruner)
        left = found.reductions[0][-1].ids.tolist() if found.reductions[0] else None
        return model.get_output_embeddings()(found.last)[0], left


def test_one_quarter_kept_gives_the_reference_logits(document, reader):
    reader, questions = reader
    by_id = {f"{GROUP}/{question.question_id}": question for question in questions}
    assert document["quarter_runs"]
    for case in document["quarter_runs"]:
        pruner = KeptQuarter(layer=case["layer"], quarter=case["quarter"])
        logits, _ = run(reader, by_id[case["sample"]], pruner)
        best = logits.topk(5)
        assert best.indices.tolist() == [one for one, _ in case["renumbered"]]
        assert best.values.tolist() == pytest.approx([value for _, value in case["renumbered"]], abs=2e-4)


@pytest.mark.parametrize("source", ["last", "equi_last", "cls", "random"])
def test_the_budget_is_kept_by_the_score_of_the_analysis(source, reader):
    reader, questions = reader
    question = questions[1]
    sample = reader.read(question)
    _, left = run(reader, question, KeptByScore(tokens=20, source=source, layer=2))
    assert len(left) == len(set(left)) == 20 and left == sorted(left)
    if source != "random":
        vectors = sample.cls if source == "cls" else getattr(sample, source)[1]
        assert left == sorted(np.argsort(-vectors, kind="stable")[:20].tolist())
    else:
        other = run(reader, question, KeptByScore(tokens=20, seed=1, source=source, layer=2))[1]
        assert other != left

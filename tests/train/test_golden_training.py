"""Training equals the reference data, and the comparison notices what differs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from helpers import golden_training

DATA = Path(__file__).parents[1] / "data" / "train"
slow = pytest.mark.skipif(os.environ.get("VISPRUNER_SLOW") != "1", reason="trains; set VISPRUNER_SLOW=1")


def test_the_reference_data_is_reproduced(capsys):
    assert golden_training.main([str(DATA), "--groups", *golden_training.CASES]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["failed"] == [] and found["cases"] == found["equal"] == 74
    assert {name: counts[0] for name, counts in found["by_group"].items()} == {
        "preprocess": 56, "collator": 5, "datasets": 2, "samplers": 6, "split_to_even_chunks": 3, "steps": 2,
    }  # fmt: skip


@slow
def test_the_official_runs_are_reproduced(capsys):
    assert golden_training.main([str(DATA), "--groups", "runs"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["by_group"] == {"runs": [21, 21]}


def test_every_kind_of_difference_is_noticed(tmp_path, capsys):
    folder = tmp_path / "train"
    shutil.copytree(DATA, folder)
    cases = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
    changed = {name: [] for name in golden_training.CASES}

    def change(group, kind, edit, **where):
        case = next(
            one
            for one in cases[group]
            if all(one.get(name) == value for name, value in where.items())
            and (group != "preprocess" or one["expected"]["target_spans"])
        )
        case = json.loads(json.dumps(case))
        edit(case)
        changed[group].append(case | {"id": kind})

    change("preprocess", "ids", lambda case: case["expected"]["input_ids"].append(5), version="v1")
    change("preprocess", "mask", lambda case: case["expected"]["target_spans"][0].__setitem__(0, 1))
    change("preprocess", "error", lambda case: case["expected"].update(error="KeyError"), version="v1")
    change("collator", "images", lambda case: case["expected"].update(images={"list": []}))
    change("datasets", "lengths", lambda case: case["expected"]["lengths"].__setitem__(0, 1))
    change("datasets", "pixels", _other_pixels)
    change("samplers", "order", lambda case: case["expected"].reverse())
    change("split_to_even_chunks", "chunks", lambda case: case["expected"].reverse())
    change("steps", "adamw", lambda case: case["adamw"]["losses"].__setitem__(3, 5.5))
    (folder / "cases.json").write_text(json.dumps(changed), encoding="utf-8")
    assert golden_training.main([str(folder), "--groups", *golden_training.CASES]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["failed"] == [case["id"] for group in changed.values() for case in group]


def _other_pixels(case):
    image = case["expected"]["items"][-1]["image"]
    image["crc32"] += 1
    image["probe"][0] += 1e-4

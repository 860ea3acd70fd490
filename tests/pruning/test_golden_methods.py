"""The methods equal recorded outputs of their official code; the comparison notices what differs."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.golden_methods import METHODS, before_cases, main

DATA = Path(__file__).parents[1] / "data" / "methods"


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_recorded_cases_are_equal(tmp_path, capsys):
    shutil.copytree(DATA / "before", tmp_path / "before")  # the other half has tests of its own
    assert main([str(tmp_path)]) == 0
    found = last_line(capsys)
    assert found["cases"] == found["equal"] == 24 and found["failed"] == []
    assert set(found["by_method"]) == set(METHODS)


def test_only_one_method(capsys):
    assert main([str(DATA), "--only", "scope"]) == 0
    assert last_line(capsys)["by_method"] == {
        "anyres_order": {"cases": 1, "equal": 1},
        "scope": {"cases": 2, "equal": 2},
        "tower": {"cases": 1, "equal": 1},
    }


@pytest.fixture
def changed(tmp_path):
    """Copy the cases of some methods with one change each."""

    def copy(method, change):
        folder = tmp_path / "before"
        shutil.copytree(DATA / "before", folder)
        cases = json.loads((folder / "cases.json").read_text())["cases"]
        case = next(one for one in cases if one["method"] == method)
        change(case)
        (folder / "cases.json").write_text(json.dumps({"cases": [case]}))
        return case["id"]

    return copy


def swap(entry):
    def change(case):
        found = case["outputs"][0][entry]
        found[0], found[1] = found[1], found[0]

    return change


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("divprune", swap("order")),
        ("divprune", swap("kept")),
        ("scope", swap("order")),
        ("prumerge", swap("order")),
        ("prumerge+", lambda case: case["outputs"][0].update(n_top=case["outputs"][0]["n_top"] + 1)),
        ("visionzip", swap("dominant")),
        ("tome", swap("groups")),
        ("tome_blocks", lambda case: case.update(prop_attn=not case["prop_attn"])),
        ("anyres_order", swap("sequence")),
        ("tower", lambda case: case.update(budget=case.get("budget", 64) - 1)),
        ("hiprune", lambda case: case.update(crc=1)),
        ("scope", lambda case: case.update(method="unheard")),
    ],
)
def test_a_changed_case_fails(changed, tmp_path, capsys, method, change):
    name = changed(method, change)
    assert main([str(tmp_path)]) == 1
    found = last_line(capsys)
    assert (found["cases"], found["equal"], found["failed"]) == (1, 0, [name])


def test_cases_that_do_not_bind_are_left_out(changed, tmp_path):
    changed("scope", lambda case: case.update(binding=False))
    assert list(before_cases(tmp_path / "before")) == []


def test_a_folder_without_cases_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2 and "contains neither before/ nor inside/" in capsys.readouterr().err

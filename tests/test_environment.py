"""VISPRUNER_* environment variables: unknown names and invalid values are refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava.environment import VARIABLES, check_environment
from llava.model.anyres import PROTOCOLS
from llava.model.builder import load_pretrained_model
from llava.model.settings import ENVIRONMENT
from llava.pruning import list_pruners

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("VISPRUNER_TOKENS", value) for value in ("0", "64", "")),
        *(("VISPRUNER_RATIO", value) for value in ("0", "0.5", "1")),
        *(("VISPRUNER_ANYRES", value) for value in PROTOCOLS),
        *(("VISPRUNER_TOWER_DTYPE", value) for value in ("float32", "torch.bfloat16", "FP16")),
        *(("VISPRUNER_ROUNDS", value) for value in ("triton", "torch")),
        *(("VISPRUNER_METHOD", value) for value in list_pruners()),
        *((f"VISPRUNER_{name}", value) for name in ("SYSTEM_PYTHON", "GRAPHS") for value in ("0", "1")),
        ("VISPRUNER_PROCESSES", "4"),
        ("VISPRUNER_CACHE", "~/cache"),
        ("OTHER_TOKENS", "anything"),
    ],
)
def test_valid_values(name, value):
    check_environment(environment={name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("VISPRUNER_ROUNDS", "tritan", "triton, torch"),
        ("VISPRUNER_TOKENS", "-1", "integer >= 0"),
        ("VISPRUNER_TOKENS", "many", "integer >= 0"),
        ("VISPRUNER_RATIO", "1.5", "from 0 to 1"),
        ("VISPRUNER_RATIO", "nan", "from 0 to 1"),
        ("VISPRUNER_ANYRES", "square", "paper, llava"),
        ("VISPRUNER_TOWER_DTYPE", "int8", "float32"),
        ("VISPRUNER_PROCESSES", "0", "integer >= 1"),
        ("VISPRUNER_SYSTEM_PYTHON", "yes", "0, 1"),
        ("VISPRUNER_GRAPHS", "off", "0, 1"),
        ("VISPRUNER_METHOD", " ", "method"),
    ],
)
def test_invalid_values_are_named_with_the_choices(name, value, expected):
    with pytest.raises(ValueError, match=rf"{name}: '{value}'.*{expected}"):
        check_environment(environment={name: value})


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="VISPRUNER_ROUND: unknown.*Use VISPRUNER_ROUNDS"):
        check_environment(environment={"VISPRUNER_ROUND": "triton"})


def test_what_an_argument_overrides_may_be_invalid():
    values = {"VISPRUNER_RATIO": "7", "VISPRUNER_TOKENS": "many"}
    check_environment(values, environment=values)
    with pytest.raises(ValueError, match="VISPRUNER_TOKENS: 'many'"):
        check_environment(["VISPRUNER_RATIO"], environment=values)


def test_loading_checks_the_environment(monkeypatch):
    monkeypatch.setenv("VISPRUNER_ROUNDS", "tritan")
    with pytest.raises(ValueError, match="VISPRUNER_ROUNDS: 'tritan'"):
        load_pretrained_model("nowhere")


def test_every_variable_that_is_read_is_known_and_the_other_way_round():
    files = [*REPOSITORY.glob("llava/**/*.py"), *REPOSITORY.glob("scripts/**/*.sh")]
    texts = [path.read_text(encoding="utf-8") for path in files if path.name != "environment.py"]
    assert set(re.findall(r"\bVISPRUNER_[A-Z_]+[A-Z]\b", "\n".join(texts))) == set(VARIABLES)
    assert set(ENVIRONMENT.values()) < set(VARIABLES)


def test_imports_nothing_heavy():
    code = "import sys, llava.environment; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Answer normalisers: every golden string of the official scorers, and what sets the rules apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.eval.benchmarks import normalize

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "normalize"
CASES = json.loads((GOLDEN / "cases.json").read_text())
RULES = {
    "evalai": normalize.evalai,
    "evalai_tokenize": normalize.evalai_tokenize,
    "vqa_official": normalize.vqa_official,
    "vqa_punct_only": normalize.punctuation,
    "vizwiz_official": normalize.vizwiz_official,
    "gqa_llava": normalize.gqa,
}


@pytest.mark.parametrize("rule", RULES)
def test_golden_strings(rule):
    assert {rule for case in CASES for rule in case} == {"in", *RULES}
    wrong = [
        (case["in"], RULES[rule](case["in"]), case[rule])
        for case in CASES
        if RULES[rule](case["in"]) != case[rule]
    ]
    assert wrong == []


def test_table_has_the_official_size_and_its_odd_entry():
    assert len(normalize.CONTRACTIONS) == len(normalize.VIZWIZ_CONTRACTIONS) == 120
    assert normalize.evalai("somebody'd") == "somebodyd"
    assert normalize.evalai("wed shed hell its lets") == "wed shed hell its lets"


def test_only_32_full_stops_go():
    assert normalize.vqa_official("." * 40) == "." * 8


def test_vizwiz_puts_typographic_apostrophes():
    assert normalize.vizwiz_official("dont") == "don\u2019t" and normalize.vizwiz_official("cant") == "can't"


@pytest.mark.parametrize("agree, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy(agree, accuracy):
    humans = ["x"] * agree + [str(number) for number in range(10 - agree)]
    assert normalize.soft_accuracy("x", humans) == pytest.approx(accuracy)


def test_yes_and_no_as_a_person_reads_them():
    table = {
        "Yes": "yes",
        "NO": "no",
        "No\n": "no",
        "No</s>": "no",
        "Answer: yes": "yes",
        "**Yes**": "yes",
        "The answer is no": "no",
        "Yes, there is not a doubt.": "yes",
        "There isn\u2019t one": "no",
        "There are none": "no",
        "There is a kite": "yes",
        "There is no kite": "no",
        "I do not know": None,
        "yes or no": None,
        "Maybe": None,
        "kite": None,
        "": None,
        "...": None,
        "Let me see. Answer: No": "no",
        "I am not sure. Yes": None,
        "\u200fNo\u200e": "no",
        "Yes\uff0e": "yes",
        "\u6ca1\u6709\u3002": "no",
        "\u662f\u7684": "yes",
    }
    assert {text: normalize.yes_or_no(text) for text in table} == table


def test_what_is_not_part_of_an_answer():
    table = {
        "<s> a cat</s>": "a cat",
        '"red"': "red",
        "ASSISTANT: red": "red",
        "it's the dogs'": "it's the dogs'",
    }
    table |= {"\u7b54\u6848\uff1a\uff21\u3002": "A.", "\u9009B": "B", "\u9009\u624b": "\u9009\u624b"}
    table |= {"<|im_end|>": "", "a < b > c": "a < b > c", "***": "*"}
    assert {text: normalize.cleaned(text) for text in table} == table

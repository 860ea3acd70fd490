"""Budgets of training: what is drawn, the same on all processes and after a resume, and what is refused."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from llava.pruning import get_pruner, list_pruners
from llava.train.budgets import Budgets

PINNED = [32, 32, 64, 64, 576, 64, 32, 32]  # of seed 7, two micro steps per step


def test_one_budget_stays() -> None:
    budgets = Budgets.parse("vispruner", "64", 0.3)
    assert budgets.pruners == (get_pruner("vispruner", tokens=64, important_ratio=0.3),)
    assert not budgets.varies and {budgets.draw(step) for step in range(20)} == set(budgets.pruners)


@pytest.mark.parametrize("word", ["none", "None", "full", "all"])
def test_none_keeps_all(word: str) -> None:
    for method in ("vispruner", "none", "random"):
        budgets = Budgets.parse(method, word)
        assert budgets.pruners == (get_pruner("none"),) and not budgets.varies


def test_draws_follow_seed_step_and_micro_step_alone() -> None:
    budgets = Budgets.parse("vispruner", "32, 64,128,576,64", 0.5, seed=7)
    assert [one.tokens for one in budgets.pruners] == [32, 64, 128, 576] and budgets.varies
    drawn = [budgets.draw(step, micro).tokens for step in range(500) for micro in range(2)]
    assert drawn == [budgets.draw(step, micro).tokens for step in range(500) for micro in range(2)]
    counts = Counter(drawn)
    assert set(counts) == {32, 64, 128, 576} and min(counts.values()) > 200  # of 1000
    other = Budgets.parse("vispruner", "32,64,128,576", 0.5, seed=8)
    assert drawn[:50] != [other.draw(step, micro).tokens for step in range(25) for micro in range(2)]
    assert drawn[::2] != drawn[1::2]
    # of every release and process, or a resumed run would go on with other batches
    assert drawn[:8] == PINNED


def test_random_tokens_are_drawn_in_every_batch() -> None:
    budgets = Budgets.parse("random", "64", seed=3)
    seeds = [budgets.draw(step, micro).seed for step in range(50) for micro in range(2)]
    assert budgets.varies and len(set(seeds)) == 100
    assert seeds == [budgets.draw(step, micro).seed for step in range(50) for micro in range(2)]
    assert {budgets.draw(step).tokens for step in range(10)} == {64}


def test_budgets_of_all_patches_are_not_pruned() -> None:
    budgets = Budgets.parse("vispruner", "none,64,576,700").within(576)
    assert budgets.pruners == (get_pruner("vispruner", tokens=64), get_pruner("none"))
    assert Budgets.parse("vispruner", "576").within(576).pruners == (get_pruner("none"),)
    same = Budgets.parse("vispruner", "64,575")
    assert same.within(576) == same


def test_all_methods_are_taken_or_refused_in_words() -> None:
    for method in list_pruners():
        pruner = get_pruner(method)
        refused = (
            pruner.acts_in == "decoder"
            or pruner.needs_question
            or "projected" in pruner.cues
            or pruner.positions == "original"
        )
        if refused:
            with pytest.raises(ValueError, match=f"--method: {re.escape(repr(method))}.*Choose another"):
                Budgets.parse(method, "64")
        elif method != "none":
            assert Budgets.parse(method, "64").pruners[0].tokens == 64
    assert Budgets.parse("hiprune", "32,none").cues == get_pruner("hiprune").cues


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vispruna", "64"), "--method: unknown pruning method 'vispruna'; did you mean 'vispruner'"),
        (("fastv", "64"), "prunes inside the language model"),
        (("fastv", "none"), "prunes inside the language model"),
        (("cdpruner", "64"), "selects by the question"),
        (("vispruner", "0"), "'0' is not a budget"),
        (("vispruner", "-3"), "'-3' is not a budget"),
        (("vispruner", "64,,32"), "'' is not a budget"),
        (("vispruner", ""), "'' is not a budget"),
        (("vispruner", "64;32"), "'64;32' is not a budget"),
        (("vispruner", "6e1"), "'6e1' is not a budget"),
        (("vispruner", "64.0"), "'64.0' is not a budget"),
        (("vispruner", "²"), "'²' is not a budget"),
        (("vispruner", "99999999999999999999"), "is not a budget"),
        (("vispruner", "64", 1.5), "--important_ratio: important_ratio must be in"),
        (("vispruner", "64", float("nan")), "--important_ratio"),
    ],
)
def test_invalid_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Budgets.parse(*arguments)

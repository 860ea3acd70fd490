"""Questions: the answers are true of the scene."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.tiny import world
from llava.tiny.world import questions
from llava.tiny.world.mixtures import ask


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_answers_are_true(seed, draw):
    scene = world.draw(seed)[1]
    rs = np.random.RandomState(draw)
    for kind, text, answer in ask(scene, rs, 12):
        if kind == "exist":
            name = text.split(" in the image?")[0].removeprefix("Is there a").removeprefix("n").strip()
            assert answer == ("Yes" if scene.count(name) else "No"), (text, answer)
        elif kind == "count":
            name = text.removeprefix("How many ").split(" are there")[0]
            singular = next(n for n in world.SPRITES if questions.plural(n) == name)
            assert int(answer) == scene.count(singular)
        elif kind == "color":
            name = text.split("?")[0].removeprefix("What color is the ")
            assert any(t.name == name and t.color == answer for t in scene.objects)
        elif kind == "choice":
            options = dict(line.split(". ", 1) for line in text.split("\n") if line[1:3] == ". ")
            english = {chinese: name for name, chinese in questions.CHINESE.items()}
            there = [k for k, v in options.items() if scene.count(english.get(v, v))]
            assert there == [answer]
        elif kind == "read":
            assert scene.names("word") == [answer]
        elif kind == "inventory":
            assert set(answer.split(", ")) == set(scene.names("sprite")) | set(scene.names("shape"))


def test_relations_are_true():
    checked = 0
    for seed in range(24):
        scene = world.draw(seed)[1]
        found = questions.related(scene, np.random.RandomState(seed))
        if found is None:
            continue
        first, relation, opposite, second = found
        (ax, ay), (bx, by) = (next(t for t in scene.objects if t.name == n).center for n in (first, second))
        holds = {"to the left of": ax < bx, "to the right of": ax > bx, "above": ay < by, "below": ay > by}
        assert holds[relation] and not holds[opposite]
        checked += 1
    assert checked > 12


@pytest.mark.parametrize(
    "name, wanted", [("dog", "a dog"), ("apple", "an apple"), ("umbrella", "an umbrella")]
)
def test_articles(name, wanted):
    assert questions.article(name) == wanted

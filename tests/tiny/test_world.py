"""The embedded world: repeatable, consistent with what it says is in a picture."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.tiny import questions, world


def test_a_seed_is_a_picture():
    first, scene = world.draw(12)
    again, same = world.draw(12)
    assert first.tobytes() == again.tobytes() and scene == same
    assert world.draw(13)[0].tobytes() != first.tobytes()
    assert world.draw(12 + world.HELD_OUT)[0].tobytes() != first.tobytes()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**40))
def test_things_lie_inside_apart_and_are_known(seed):
    image, scene = world.draw(seed)
    assert image.mode == "RGB" and image.size == scene.size and max(image.size) == world.SIDE
    boxes = [thing.box for thing in scene.things]
    for thing in scene.things:
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
        assert thing.name in {"sprite": world.SPRITES, "shape": world.SHAPES, "word": world.WORDS}[thing.kind]
        assert (thing.color in world.COLORS) == (thing.kind == "shape")
    for number, a in enumerate(boxes):
        for b in boxes[:number]:
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_sprites_are_really_painted():
    """Behind a sprite's box the picture is its sprite, not background."""
    image, scene = world.draw(3)
    thing = max((t for t in scene.things if t.kind == "sprite"), key=lambda t: t.box[2] - t.box[0])
    side = thing.box[2] - thing.box[0]
    wanted = world.sprite(thing.name).resize((side, side))
    found = np.asarray(image.crop(thing.box), float)
    mask = np.asarray(wanted)[..., 3] > 250
    plain, mirrored = (np.asarray(w.convert("RGB"), float) for w in (wanted, wanted.transpose(0)))
    distance = min(np.abs(found - plain)[mask].mean(), np.abs(found - mirrored)[mask[:, ::-1]].mean())
    assert distance < 12


def test_backgrounds_are_busy():
    """Neighbouring 14-pixel patches of a background differ: smooth ones make every method look the same."""
    deviations = []
    for seed in range(6):
        grey = np.asarray(world.background(np.random.RandomState(seed), 336, 336).convert("L"), float)
        patches = grey.reshape(24, 14, 24, 14).transpose(0, 2, 1, 3).reshape(576, 196)
        deviations.append(np.median(patches.std(1)))
    assert np.mean(deviations) > 8


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_answers_are_true(seed, draw):
    scene = world.draw(seed)[1]
    rs = np.random.RandomState(draw)
    for kind, text, answer in questions.ask(scene, rs, 12):
        if kind == "exist":
            name = text.split(" in the image?")[0].removeprefix("Is there a").removeprefix("n").strip()
            assert answer == ("Yes" if scene.count(name) else "No"), (text, answer)
        elif kind == "count":
            name = text.removeprefix("How many ").split(" are there")[0]
            singular = next(n for n in world.SPRITES if questions.plural(n) == name)
            assert int(answer) == scene.count(singular)
        elif kind == "color":
            name = text.split("?")[0].removeprefix("What color is the ")
            assert any(t.name == name and t.color == answer for t in scene.things)
        elif kind == "choice":
            options = dict(line.split(". ", 1) for line in text.split("\n") if line[1:3] == ". ")
            english = {chinese: name for name, chinese in questions.CHINESE.items()}
            there = [k for k, v in options.items() if scene.count(english.get(v, v))]
            assert there == [answer]
        elif kind == "read":
            assert scene.names("word") == [answer]
        elif kind == "inventory":
            assert set(answer.split(", ")) == set(scene.names("sprite")) | set(scene.names("shape"))


def test_relations_hold():
    checked = 0
    for seed in range(24):
        scene = world.draw(seed)[1]
        found = questions.related(scene, np.random.RandomState(seed))
        if found is None:
            continue
        first, relation, opposite, second = found
        (ax, ay), (bx, by) = (next(t for t in scene.things if t.name == n).center for n in (first, second))
        holds = {"to the left of": ax < bx, "to the right of": ax > bx, "above": ay < by, "below": ay > by}
        assert holds[relation] and not holds[opposite]
        checked += 1
    assert checked > 12


@pytest.mark.parametrize(
    "name, wanted", [("dog", "a dog"), ("apple", "an apple"), ("umbrella", "an umbrella")]
)
def test_articles(name, wanted):
    assert questions.article(name) == wanted

"""Scenes: repeatable, and the labels match the image."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.tiny import world
from llava.tiny.world.background import background
from llava.tiny.world.foreground import sprite


def test_a_seed_determines_the_image():
    first, scene = world.draw(12)
    again, same = world.draw(12)
    assert first.tobytes() == again.tobytes() and scene == same
    assert world.draw(13)[0].tobytes() != first.tobytes()
    assert world.draw(12 + world.HELD_OUT)[0].tobytes() != first.tobytes()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**40))
def test_objects_are_inside_do_not_overlap_and_have_known_names(seed):
    image, scene = world.draw(seed)
    assert image.mode == "RGB" and image.size == scene.size and max(image.size) == world.SIDE
    boxes = [item.box for item in scene.objects]
    for item in scene.objects:
        left, top, right, bottom = item.box
        assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
        assert item.name in {"sprite": world.SPRITES, "shape": world.SHAPES, "word": world.WORDS}[item.kind]
        assert (item.color in world.COLORS) == (item.kind == "shape")
    for number, a in enumerate(boxes):
        for b in boxes[:number]:
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_the_labelled_box_contains_the_sprite():
    image, scene = world.draw(3)
    item = max((t for t in scene.objects if t.kind == "sprite"), key=lambda t: t.box[2] - t.box[0])
    side = item.box[2] - item.box[0]
    wanted = sprite(item.name).resize((side, side))
    found = np.asarray(image.crop(item.box), float)
    mask = np.asarray(wanted)[..., 3] > 250
    plain, mirrored = (np.asarray(w.convert("RGB"), float) for w in (wanted, wanted.transpose(0)))
    distance = min(np.abs(found - plain)[mask].mean(), np.abs(found - mirrored)[mask[:, ::-1]].mean())
    assert distance < 12


def test_backgrounds_are_busy():
    """Pixels vary within 14-pixel patches; on smooth backgrounds all methods score the same."""
    deviations = []
    for seed in range(6):
        gray = np.asarray(background(np.random.RandomState(seed), 336, 336).convert("L"), float)
        patches = gray.reshape(24, 14, 24, 14).transpose(0, 2, 1, 3).reshape(576, 196)
        deviations.append(np.median(patches.std(1)))
    assert np.mean(deviations) > 8


def test_worlds_differ_in_number_and_size_of_objects():
    def sprites(kind):
        scenes = [world.draw(seed, kind)[1] for seed in range(40, 46)]
        assert {scene.world for scene in scenes} == {kind}
        found = [item.box for scene in scenes for item in scene.objects if item.kind == "sprite"]
        return len(found) / len(scenes), np.median([right - left for left, _, right, _ in found])

    (many, small), (some, medium), (few, large) = map(sprites, ("many-small", "standard", "few-large"))
    assert many > 1.5 * some and some > few and 1.3 * small < medium < large / 1.3
    assert world.draw(41)[1] == world.draw(41, "standard")[1]

"""Clips: repeatable, labels that agree with the pixels, questions with true answers."""

import numpy as np
import pytest

from llava.tiny.training.clip_trainer import clip_labels, places_of, reversed_clip
from llava.tiny.world.clip_questions import MAKERS, ask_about
from llava.tiny.world.clips import CLIP_SIDE, COLORS, draw_clip
from llava.tiny.world.vocabulary import OBJECTS

CLIPS = [draw_clip(seed) for seed in range(40)]


def test_clips_are_functions_of_their_seeds():
    assert [draw_clip(seed) for seed in range(5)] == CLIPS[:5]
    assert np.array_equal(CLIPS[3].frame(4), draw_clip(3).frame(4))
    assert CLIPS[3].frame(0).size == (CLIP_SIDE, CLIP_SIDE)
    assert len({item.role for clip in CLIPS for item in clip.objects}) == 5
    assert {clip.pan != (0, 0) for clip in CLIPS} == {True, False}


def test_pixels_change_where_labels_say_so():
    for clip in CLIPS:
        if clip.pan != (0, 0):
            continue
        first, last = (np.asarray(clip.frame(n), int) for n in (0, clip.length - 1))
        changed = np.abs(first - last).max(-1) > 0
        boxes = np.zeros_like(changed)
        for item in clip.objects:
            ends = [item.corner(time) for time in (0.0, 1.0)]
            assert (ends[0] is None) == (item.role == "enters") and (ends[1] is None) == (
                item.role == "leaves"
            )
            for corner in ends:
                if corner is not None:
                    x, y = (round(value) for value in corner)
                    box = np.s_[max(y, 0) : y + item.side + 1, max(x, 0) : x + item.side + 1]
                    boxes[box] = True
                    if item.role != "stays":
                        assert changed[box].any(), item
        assert not changed[~boxes].any()


def test_objects_never_overlap():
    for clip in CLIPS[:10]:
        for time in np.linspace(0, 1, 17):
            spots = [(c, i.side) for i in clip.objects if (c := i.corner(time)) is not None]
            for number, (a, m) in enumerate(spots):
                for b, n in spots[number + 1 :]:
                    assert a[0] + m < b[0] or b[0] + n < a[0] or a[1] + m < b[1] or b[1] + n < a[1]


@pytest.mark.parametrize("change", [lambda clip: clip, reversed_clip], ids=["forwards", "backwards"])
def test_answers_are_true(change):
    seen = set()
    for clip in map(change, CLIPS):
        by_name = {item.name: item for item in clip.objects}
        for kind, question, answer in ask_about(clip, np.random.RandomState(clip.seed), 12):
            seen.add(kind)
            words = question.rstrip("?").split()
            time = {"start": 0.0, "end": 1.0}.get(words[-1])
            item = next((by_name[word] for word in words if word in by_name), None)
            if kind in ("exist", "exist_at"):
                there = item is not None and (time is None or item.corner(time) is not None)
                assert answer == ("yes" if there else "no"), question
            elif kind in ("color", "color_at"):
                assert answer == item.color_at(0.0 if time is None else time) and answer in COLORS
            elif kind == "direction":
                assert answer == item.direction and item.role == "moves"
            elif kind == "action":
                assert answer.split()[0].startswith(item.role.rstrip("s")) and (
                    item.role != "moves" or answer == f"moves {item.direction}"
                )
            else:
                assert by_name[answer].role == kind.removeprefix("what_")
    assert seen == {maker.__name__ for maker in MAKERS}


def test_a_clip_played_backwards_has_its_frames_in_reverse():
    for clip in CLIPS[:8]:
        back = reversed_clip(clip)
        for time in np.linspace(0, 1, 9):
            for item, turned in zip(clip.objects, back.objects, strict=True):
                there, here = item.corner(time), turned.corner(1 - time)
                assert (there is None) == (here is None)
                if there is not None:
                    assert np.allclose(there, here)


def test_patch_labels_and_places():
    labels = clip_labels(CLIPS[0])
    assert labels.shape == (8, 257) and (labels[:, 0] == -1).all()
    for frame, time in ((0, 0.0), (7, 1.0)):
        names = {item.name for item in CLIPS[0].objects if item.corner(time) is not None}
        assert {OBJECTS[label] for label in labels[frame] if label >= 0} == names
    rs = np.random.RandomState(0)
    assert np.array_equal(places_of(rs, 2056), np.arange(2056))
    for _ in range(6):
        places = places_of(rs, 114)
        assert len(set(places)) == 114 and (places % 257 > 0).all() and (np.diff(places) > 0).all()

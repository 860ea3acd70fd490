"""Shared parts of the benchmark writers."""

from llava.tiny.benchmarks import common


def test_balanced_takes_equally_many_from_every_group():
    groups = {"a": list(range(10)), "b": [1], "c": list(range(10))}
    assert [len(common.balanced({key: groups[key]}, 4)) for key in groups] == [4, 1, 4]
    taken = common.balanced(groups, 9)
    assert len(taken) == 9 and taken == [0, 1, 2, 3, 1, 0, 1, 2, 3]


def test_mentioned_objects_are_in_the_singular():
    assert mentioned("Are there 2 sheep in the image?") == {"sheep"}
    assert mentioned("Is the cross to the left of the bus?") == {"cross", "bus"}
    assert mentioned("Is there only one of the buses in the image?") == {"bus"}


def mentioned(text):
    return set(common.mentioned_objects(text))

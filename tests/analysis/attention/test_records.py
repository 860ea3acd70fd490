"""Samples on disk: the same after any kill, and never mixed with those of another analysis."""

import numpy as np
import pytest

from llava.analysis.attention import AttentionSample, Records

HEADER = {"model": "m"}


def sample(number, tokens=8):
    stacked = np.random.default_rng(number).random((5, 3, tokens))
    cls = np.random.default_rng(100 + number).random(tokens)
    return AttentionSample(*stacked, cls=cls, visual_start=3, length=20 + number)


def write(path, numbers):
    with Records(path, HEADER) as records:
        for number in numbers:
            if number not in records:
                records.append(number, sample(number))
        return [(one.length, one.last.tobytes(), one.cls.tobytes()) for one in records.samples(range(9))]


def test_a_kill_at_any_byte_gives_the_same_samples(tmp_path):
    path = tmp_path / "deep" / "a.bin"
    wanted = write(path, [0, 1, 2])
    whole = path.read_bytes()
    for size in {0, 1, *range(2, len(whole), 97), len(whole) - 1}:
        path.write_bytes(whole[:size])
        assert write(path, [0, 1, 2]) == wanted and path.read_bytes() == whole
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1  # in the second record: it and what follows are read again
    path.write_bytes(changed)
    assert write(path, [0, 1, 2]) == wanted
    assert write(path, []) == wanted


def test_values_are_float32_and_in_the_order_of_the_questions(tmp_path):
    write(tmp_path / "a.bin", [5, 2])
    with Records(tmp_path / "a.bin", HEADER) as records:
        stored = records.samples(range(9))
        assert len(stored) == 2 and [one.length for one in stored] == [22, 25] == [o.length for o in stored]
        assert (records.read(5).equi_last == sample(5).equi_last.astype(np.float32)).all()
        with pytest.raises(
            ValueError, match="question 7: attention of 3 layers to 4 tokens, before it 3 and 8"
        ):
            records.append(7, sample(7, tokens=4))


def test_another_analysis_and_another_process_are_refused(tmp_path):
    path = tmp_path / "a.bin"
    write(path, [0])
    before = path.read_bytes()
    with pytest.raises(OSError, match="another analysis"):
        Records(path, {"model": "n"})
    assert path.read_bytes() == before
    with Records(path, HEADER), pytest.raises(OSError, match="another process"):
        Records(path, HEADER)

"""The video sets: bundled files, official layout, frames as they were drawn."""

import json

import numpy as np
import pytest

from llava.eval.benchmarks import get_benchmark
from llava.paths import BUNDLED_CLIPS
from llava.tiny import build_video
from llava.tiny.benchmarks.video import SETS
from llava.tiny.world.clips import draw_clip
from llava.tiny.world.scenes import HELD_OUT

pytest.importorskip("av")


def test_bundled_files_match_their_checksums(capsys):
    assert build_video.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", SETS)
def test_bundled_sets_are_read_as_the_official_ones(name):
    benchmark = get_benchmark(name)
    data = benchmark.locate(BUNDLED_CLIPS)
    problems = []
    questions = list(benchmark.questions(data, problems))
    assert not problems and all(question.image.is_file() for question in questions)
    assert benchmark.check(data, questions) == [] and len({one.image for one in questions}) == 50
    truth = benchmark.truth(data)
    assert set(truth) == {one.question_id for one in questions} and len(truth) == len(questions)
    assert all(one.text.endswith("?") == (name != "activitynet") for one in questions)
    assert {entry["type"] for entry in truth.values()} == ({3, 8} if name == "activitynet" else {3})


def test_written_sets(tmp_path, capsys):
    assert build_video.main(["--num-clips", "1", "--output", str(tmp_path)]) == 0
    counts = json.loads(capsys.readouterr().out)["questions"]
    for number, name in enumerate(("msvd", "tgif")):
        benchmark = get_benchmark(name)
        questions = list(benchmark.questions(benchmark.locate(tmp_path), []))
        assert len(questions) == counts[name] and len({one.image for one in questions}) == 1
        frames, clip = benchmark.load_image(questions[0].image), draw_clip(HELD_OUT + number)
        for frame, index in zip(frames, (i * (clip.length - 1) // 7 for i in range(8)), strict=True):
            drawn = np.asarray(clip.frame(index), int)
            assert np.abs(np.asarray(frame, int) - drawn).mean() < 15
    links = [path for path in tmp_path.rglob("*") if path.is_symlink()]
    assert sorted(path.name for path in links) == ["all", "all_test"]
    assert build_video.main(["--check", "--output", str(tmp_path)]) == 0
    next(tmp_path.rglob("*.mp4")).write_bytes(b"")
    assert build_video.main(["--check", "--output", str(tmp_path)]) == 1

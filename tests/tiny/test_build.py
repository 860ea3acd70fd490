"""Writing and checking the bundled benchmarks: POPE's layout and labels, checksums."""

import json
import shutil
from collections import Counter

import pytest
from PIL import Image

from llava.paths import BUNDLED_DATA
from llava.tiny import build, world
from llava.tiny.benchmarks.common import held_out_images


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    assert build.main(["--pictures", "4", "--output", str(root)]) == 0
    return root


def test_layout_and_ids(small):
    folder = small / "pope"
    asked = lines(folder / "llava_pope_test.jsonl")
    assert len(asked) == 4 * 6 * 3 and len({row["question_id"] for row in asked}) == len(asked)
    assert [row["category"] for row in asked] == ["adversarial"] * 24 + ["random"] * 24 + ["popular"] * 24
    for category in ("adversarial", "random", "popular"):
        labels = lines(folder / "coco" / f"coco_pope_{category}.json")
        mine = [row for row in asked if row["category"] == category]
        assert [row["question_id"] for row in labels] == list(range(1, 25))
        assert [row["question_id"] % 10_000_000 for row in mine] == list(range(1, 25))
        for question, label in zip(mine, labels, strict=True):
            assert question["image"] == label["image"] and question["text"].startswith(
                label["text"] + "\nAnswer"
            )
        assert Counter(row["label"] for row in labels) == {"yes": 12, "no": 12}
    for row in asked:
        assert Image.open(folder / "val2014" / row["image"]).size[0] in (252, 336)


def test_labels_are_true(small):
    scenes = {image.file: image.scene for image in held_out_images(4)}
    for path in (small / "pope" / "coco").glob("*.json"):
        for row in lines(path):
            name = row["text"].removeprefix("Is there a").removeprefix("n").split(" in the image")[0].strip()
            assert (row["label"] == "yes") == bool(scenes[row["image"]].count(name)), row


def test_images_are_held_out():
    assert all(image.scene.seed >= world.HELD_OUT for image in held_out_images(3))


def test_other_seeds_and_worlds(tmp_path, capsys):
    """Other seeds give other images; a world changes how many objects there are, and how large."""
    arguments = ["--seed", str(world.HELD_OUT + 7), "--world", "many-small", "--output", str(tmp_path)]
    assert build.main(["--pictures", "3", "--benchmarks", "pope,vizwiz,textvqa", *arguments]) == 0
    scenes = [image.scene for image in held_out_images(3, seed=world.HELD_OUT + 7, kind="many-small")]
    labels = {row["text"] for row in lines(tmp_path / "pope" / "coco" / "coco_pope_random.json")}
    assert any(f"Is there a {name} in the image?" in labels for name in scenes[0].names())
    seeds = [
        one["seed"]
        for one in json.loads((tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").read_text())["data"]
    ]
    assert min(seeds) > scenes[-1].seed  # its own images are of the same world, after the shared ones
    assert world.draw(seeds[0], "many-small")[1].names("word")
    capsys.readouterr()
    for bad in (["--seed", "5"], ["--seed", str(2**63)], ["--world", "huge"]):
        with pytest.raises(SystemExit):
            build.main([*bad, "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        build.main(["--world", "few-large", "--output", str(BUNDLED_DATA)])
    assert "Name another folder" in capsys.readouterr().err
    assert build.check(BUNDLED_DATA) == []


def test_check_finds_changes(small, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(small, root)
    assert build.main(["--check", "--output", str(root)]) == 0
    image = next((root / "pope" / "val2014").iterdir())
    image.write_bytes(image.read_bytes() + b"x")
    (root / "pope" / "llava_pope_test.jsonl").unlink()
    assert build.main(["--check", "--output", str(root)]) == 1
    said = capsys.readouterr().out
    assert "llava_pope_test.jsonl: missing" in said and f"{image.name}: changed" in said
    (root / build.CHECKSUMS).write_text("nonsense\n")
    assert "SHA256SUMS:1" in build.check(root)[0]


def test_the_bundled_files_are_complete():
    assert build.check(BUNDLED_DATA) == []
    asked = lines(BUNDLED_DATA / "pope" / "llava_pope_test.jsonl")
    images = {row["image"] for row in asked}
    assert len(asked) >= 2000 and len(images) == 200
    assert sum(path.stat().st_size for path in (BUNDLED_DATA / "pope").rglob("*") if path.is_file()) < 5e6

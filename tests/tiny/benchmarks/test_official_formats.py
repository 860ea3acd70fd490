"""The bundled benchmarks: official layouts, true answers, and the full score for correct ones."""

from __future__ import annotations

import base64
import csv
import functools
import json
import shutil
from collections import Counter

import pytest

from llava.eval.benchmarks import get_benchmark
from llava.paths import BUNDLED_DATA as ROOT
from llava.tiny import build, world
from llava.tiny.benchmarks import common
from llava.tiny.benchmarks.choices import parsed
from llava.tiny.benchmarks.pope import OFFSETS
from llava.tiny.world import questions
from llava.tiny.world.mixtures import MIXTURES

FULL_SCORES = {
    "vqav2": 100.0,
    "vqav2_val": 100.0,
    "gqa": 100.0,
    "vizwiz": 100.0,
    "vizwiz_val": 100.0,
    "scienceqa": 100.0,
    "scienceqa_full": 100.0,
    "textvqa": 100.0,
    "mme": 800.0,
    "mmbench": 100.0,
    "mmbench_cn": 100.0,
    "pope": 100.0,
}


def read(name, root=ROOT):
    """Return (benchmark, its folder, questions); fail on any issue or warning."""
    benchmark, problems = get_benchmark(name), []
    folder = benchmark.locate(root / benchmark.folder)
    found = list(benchmark.questions(folder, problems))
    assert problems == [] and benchmark.check(folder, found) == []
    return benchmark, folder, found


def right_answers(benchmark, folder):
    """{(question_id, text of the question): answer as the model would write it}, from the ground truth."""
    load = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))  # noqa: E731
    kind = benchmark.folder
    if kind == "vqav2":
        return {
            row["question_id"]: row["multiple_choice_answer"].capitalize()
            for row in load("v2_mscoco_val2014_annotations.json")["annotations"]
        }
    if kind == "gqa":
        return {
            key: row["answer"].capitalize()
            for key, row in load("data/testdev_balanced_questions.json").items()
        }
    if kind == "vizwiz":
        return {number: row["answers"][0]["answer"] for number, row in enumerate(load("val.json"))}
    if kind == "scienceqa":
        return {key: "ABCD"[row["answer"]] for key, row in load("problems.json").items()}
    if kind == "textvqa":
        return {row["image_id"]: row["answers"][0].upper() for row in load("TextVQA_0.5.1_val.json")["data"]}
    if kind == "pope":
        return {
            offset + row["question_id"]: row["label"].capitalize()
            for category, offset in OFFSETS.items()
            for row in map(json.loads, (folder / "coco" / f"coco_pope_{category}.json").open())
        }
    if kind == "MME":
        return {
            (f"{path.parts[-3]}/images/{path.stem}.webp", line.split(questions.MME_TAIL)[0]): line.split(
                "\t"
            )[1]
            for path in folder.rglob("*.txt")
            for line in path.read_text().splitlines()
        }
    with open(benchmark.find(folder, benchmark.marker), encoding="utf-8", newline="") as file:
        return {int(row["index"]): row["answer"] for row in csv.DictReader(file, delimiter="\t")}


def answered(benchmark, folder, found, text=None):
    """Answer lines with the right answers, or one text for all."""
    truth = right_answers(benchmark, folder)
    rows = []
    for question in found:
        prompt = question.extra.get("prompt", question.text)
        bare = question.question_id, question.text.removesuffix(questions.SHORT)
        said = truth[bare] if bare in truth else truth[question.question_id]
        rows.append({"question_id": question.question_id, "prompt": prompt, "text": text or said})
    return rows


@pytest.mark.parametrize("name", FULL_SCORES)
def test_correct_answers_have_the_full_score(name):
    benchmark, folder, found = read(name)
    rows = answered(benchmark, folder, found)
    score = benchmark.score(folder, rows)
    assert score.score == pytest.approx(FULL_SCORES[name])
    tallies = benchmark.per_image_counts(folder, rows)
    assert benchmark.score_counts(tallies.counts.sum(0)) == pytest.approx(FULL_SCORES[name])
    expected = {"mme": "10 tasks", "scienceqa": "without an image have no answer"}
    assert all(name in expected and expected[name] in warning for warning in score.warnings)


@pytest.mark.parametrize(
    "name, most",
    [
        ("vqav2", 0.26),
        ("gqa", 0.42),
        ("vizwiz", 0.41),
        ("scienceqa", 0.26),
        ("textvqa", 0.15),
        ("mmbench", 0.0),
        ("mmbench_cn", 0.0),
    ],
)
def test_constant_answers_score_low(name, most):
    benchmark, folder, found = read(name)
    answers = Counter(row["text"] for row in answered(benchmark, folder, found))
    for text, _ in answers.most_common(3):
        assert benchmark.score(folder, answered(benchmark, folder, found, text)).score <= 100 * most


def test_yes_and_no_are_equally_frequent_in_every_question_type():
    for name in ("vqav2", "gqa", "mme"):
        benchmark, folder, found = read(name)
        counts = Counter(row["text"] for row in answered(benchmark, folder, found))
        assert counts["Yes"] == counts["No"] > 100
    entries = json.loads((ROOT / "gqa/data/testdev_balanced_questions.json").read_text()).values()
    positions = Counter(row["answer"] for row in entries if row["types"]["semantic"] == "rel")
    assert positions["yes"] == positions["no"] > 80


@functools.cache
def scenes():
    return {image.file: image.scene for image in common.held_out_images(200)}


def count_of(scene, item):
    return max(
        scene.count(item),
        max((scene.count(name) for name in world.OBJECTS if questions.plural(name) == item), default=0),
    )


def holds(scene, text):
    """Tell whether a yes/no question is true of a scene, by rules that are independent of the makers."""
    words = text.removesuffix("?").split()
    if text.startswith("Is there only one of the "):
        return count_of(scene, words[6]) == 1
    if words[0] == "Are":
        return count_of(scene, words[3]) == int(words[2])
    if words[:2] == ["Is", "there"] and words[4] == "in":
        return scene.count(words[3]) > 0
    colors = {(item.name, item.color) for item in scene.objects}
    if words[:2] == ["Is", "there"]:
        return (words[4], words[3]) in colors
    if len(words) == 4:
        return (words[2], words[3]) in colors
    ((a,), (b,)) = ([item for item in scene.objects if item.name == name] for name in (words[2], words[-1]))
    (ax, ay), (bx, by) = a.center, b.center
    return {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}[
        next(word for word in words[3:-1] if word in ("left", "right", "above", "below"))
    ]


def test_answers_are_true_of_the_scenes():
    world_of, checked = scenes(), Counter()
    for name in ("vqav2", "gqa", "mme", "vizwiz", "scienceqa", "mmvet"):
        benchmark, folder, found = read(name)
        truth = right_answers(benchmark, folder) if name != "mmvet" else {}
        for question in found:
            scene, lines = world_of[question.image.name], question.text.split("\n")
            said = truth.get(question.question_id) or truth.get((question.question_id, lines[0]))
            if name == "mmvet":
                parts = json.loads((folder / "mm-vet.json").read_text())[f"v1_{question.question_id}"]
                true = sorted(scene.names("sprite") + scene.names("shape")) == parts["answer"].split("<AND>")
            elif lines[0].startswith("How many"):
                true = count_of(scene, lines[0].split()[2]) == int(said)
            elif lines[0].startswith("What color"):
                (name_,) = (name for name in world.SHAPES if f"the {name}?" in lines[0])
                colors = {item.name: item.color for item in scene.objects}
                true = colors.get(name_, "unanswerable") == said.lower()
            elif name == "scienceqa":
                _, _, options = parsed(question.text)
                true = [scene.count(option) > 0 for option in options] == [
                    "ABCD"[place] == said for place in range(len(options))
                ]
            else:
                true = holds(scene, lines[0]) == (said == "Yes")
            assert true, (name, question, said)
            checked[name] += 1
    assert min(checked.values()) >= 30 and sum(checked.values()) > 1500


def test_signs_and_tables_are_true():
    benchmark, folder, found = read("textvqa")
    truth, seen = right_answers(benchmark, folder), max(scene.seed for scene in scenes().values())
    rows = json.loads((folder / "TextVQA_0.5.1_val.json").read_text())["data"]
    assert [row["seed"] for row in rows] == sorted(row["seed"] for row in rows) and rows[0]["seed"] > seen
    for question, row in zip(found, rows, strict=True):
        if row["question_id"] % 4 == 0:  # drawing takes its time
            assert world.draw(row["seed"])[1].names("word") == [truth[question.question_id]]
        assert question.text.count(questions.OCR) == 0 or truth[question.question_id] in question.text
    assert sum(questions.OCR in question.text for question in found) == len(found) // 2
    by_bytes = {path.read_bytes(): path.name for path in (ROOT / common.IMAGES).iterdir()}
    english = {chinese: name for name, chinese in questions.CHINESE.items()}
    world_of = scenes()
    for name in ("mmbench", "mmbench_cn"):
        benchmark, folder = get_benchmark(name), ROOT / name
        with open(benchmark.find(folder, benchmark.marker), encoding="utf-8", newline="") as file:
            rows = {int(row["index"]): row for row in csv.DictReader(file, delimiter="\t")}
        for index, row in rows.items():
            # base64 in every row, as other programs read no reference to another row
            scene = world_of[by_bytes[base64.b64decode(row["image"], validate=True)]]
            options = {letter: english.get(row[letter], row[letter]) for letter in "ABCD" if row[letter]}
            if row["question"].startswith("What color"):
                color = {item.name: item.color for item in scene.objects}[row["question"][:-1].split()[-1]]
                assert [letter for letter in options if options[letter] == color] == [row["answer"]]
            else:
                assert [letter for letter in options if scene.count(options[letter])] == [row["answer"]]
            base, turn = rows[index % 1_000_000], index // 1_000_000
            first = [base[letter] for letter in "ABCD" if base[letter]]
            assert list(options) == list("ABCD"[: len(first)]) and turn < len(first)
            assert [row[letter] for letter in options] == first[-turn:] + first[:-turn] if turn else True
        assert len(rows) == sum(
            sum(bool(row[letter]) for letter in "ABCD") for index, row in rows.items() if index < 1_000_000
        )


def test_the_wording_equals_that_of_training():
    makers = {
        "vqav2": ("count", "color", "exist", "color_check", "count_check"),
        "gqa": ("exist", "color", "color_check", "position"),
        "vizwiz": ("unanswerable",),
        "mme": ("exist", "color_check", "count_check", "position"),
        "scienceqa": ("science",),
        "textvqa": ("read",),
        "mmbench": ("choice", "choice_color"),
        "mmbench_cn": ("choice",),
        "mmvet": ("inventory",),
    }
    trained = {maker.__name__ for maker in MIXTURES["suite"]}
    for name, used in makers.items():
        assert trained.issuperset(used)
        _, _, found = read(name)
        for question in found:
            tail = question.text.split("\n", 1)[1:]
            if name in ("vqav2", "gqa", "mme"):
                assert tail == [questions.SHORT[1:]]
            elif name == "mmvet":
                assert tail == []
            elif name == "vizwiz":
                assert tail == [(questions.UNANSWERABLE + questions.SHORT)[1:]]
            else:
                ends = {"mmbench_cn": questions.LETTER_CN, "textvqa": questions.SHORT}
                assert question.text.endswith(ends.get(name, questions.LETTER))


def test_images_are_shared_and_small():
    shared = {path.resolve() for path in (ROOT / common.IMAGES).iterdir()}
    assert len(shared) == 200
    for name in common.IMAGE_LINKS:
        assert (ROOT / name).is_symlink() and not (ROOT / name).readlink().is_absolute()
        assert {path.resolve() for path in (ROOT / name).iterdir()} == shared
    for name in ("vqav2", "gqa", "vizwiz", "scienceqa", "mme", "mmvet"):
        _, _, found = read(name)
        assert {question.image.resolve() for question in found} <= shared
    files = {path.resolve() for path in ROOT.rglob("*") if path.is_file()}
    sizes = {end: sum(one.stat().st_size for one in files if one.suffix == end) for end in (".webp", ".tsv")}
    assert (
        sizes[".webp"] < 9e6 and sizes[".tsv"] < 13e6
    )  # a table repeats the image of a question per rotation
    assert sum(path.stat().st_size for path in files) < 21e6


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    assert build.main(["--num-images", "10", "--output", str(root)]) == 0
    return root


def test_every_benchmark_is_written_and_read_at_any_size(small, capsys):
    for name in FULL_SCORES:
        benchmark, folder, found = read(name, small)
        score = benchmark.score(folder, answered(benchmark, folder, found)).score
        assert score == pytest.approx(FULL_SCORES[name]) and found
    assert len(read("mmvet", small)[2]) == 2


def test_writing_again_writes_the_same(small):
    before = build.checksums(small)
    assert build.main(["--num-images", "10", "--output", str(small), "--benchmarks", "gqa,mme,mmbench"]) == 0
    assert build.checksums(small) == before and build.check(small) == []


def test_a_lost_link_is_found_and_restored(small, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(small, root, symlinks=True)
    name = common.IMAGE_LINKS[1]
    (root / name).unlink()
    (root / name).write_text("../../pope/val2014")  # what git makes of a link where there are none
    (wrong,) = build.check(root)
    assert name in wrong and "should be a link" in wrong
    common.link_images(root, name)
    assert build.check(root) == []
    shutil.copytree(small, tmp_path / "followed")  # copies instead of links are as good
    assert build.check(tmp_path / "followed") == []


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        build.main(["--benchmarks", "gqa,msvd"])
    assert "Choose from pope, vqav2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not in IMAGE_LINKS"):
        common.link_images(ROOT, "elsewhere")

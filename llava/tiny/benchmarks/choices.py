"""Bundled benchmarks with option letters (ScienceQA, MMBench, MMBench-CN) and with question pairs (MME).

Every function takes the root of all benchmarks and the images, writes the official files and returns the
number of questions. Correct letters rotate, so that all are equally frequent.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava.tiny import world
from llava.tiny.world import questions
from llava.tiny.world.questions import LETTER, LETTER_CN, MME_TAIL, SHORT, Maker

from .common import (
    IMAGES,
    BenchmarkImage,
    QuestionSampler,
    link_images,
    mentioned_objects,
    write_json,
    write_jsonl,
)

TEXT_ONLY = 0.2  # ScienceQA: number of questions without an image, as a fraction of the images
FEW = 0.2  # fraction of the images in MMBench, whose files contain them, and per task of MME
ROTATION = 1_000_000
_COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
)
_LEVEL = "finegrained_perception (instance-level)"


def parsed(text: str) -> tuple[list[str], str, list[str]]:
    """Split a multiple-choice prompt into (lines before the question, question, options)."""
    lines = text.split("\n")[:-1]
    options = [line[3:] for line in lines if line[1:3] == ". "]
    *before, question = lines[: len(lines) - len(options)]
    return before, question, options


def scienceqa(root: Path, images: list[BenchmarkImage]) -> int:
    """Write ScienceQA: a question with a hint per image, and some that the hint answers without an image."""
    folder, sampler = root / "scienceqa", QuestionSampler(61)
    asked, problems = [], {}

    def add(text: str, letter: str, image: str | None) -> None:
        identity = str(len(asked) + 1)
        before, question, options = parsed(text)
        value = text.removesuffix(LETTER)
        entry = {
            "id": identity,
            "conversations": [
                {"from": "human", "value": value if image is None else f"<image>\n{value}"},
                {"from": "gpt", "value": letter},
            ],
        }
        asked.append(entry if image is None else {**entry, "image": image})
        problems[identity] = {
            "question": question,
            "choices": options,
            "answer": "ABCDE".index(letter),
            "hint": "".join(before).removeprefix("Context: "),
            "image": image,
            "task": "closed choice",
            "grade": "grade1",
            "subject": "natural science",
            "topic": "things",
            "category": "Themes",
            "skill": "Find what is there",
            "lecture": "",
            "solution": "",
            "split": "test",
        }

    for number, image in enumerate(images):
        drawn = sampler.sample(
            questions.science, image, lambda _, answer, wanted="ABCD"[number % 4]: answer == wanted
        )
        assert drawn, f"no question about image {image.number}"
        add(*drawn, image.file)
    for number in range(max(1, round(TEXT_ONLY * len(images)))):
        add(*_by_hint(number), None)
    link_images(root, "scienceqa/images/test")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "llava_test_CQM-A.json", asked)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})
    return len(asked)


def _by_hint(number: int) -> tuple[str, str]:
    """Sample a question without an image: one option belongs to the theme in the hint."""
    rs = np.random.RandomState([62, number])
    right = number % 4
    theme = list(world.THEMES)[rs.randint(len(world.THEMES))]
    others = [name for one, names in world.THEMES.items() if one != theme for name in names]
    names = [str(name) for name in rs.permutation(others)[: rs.randint(max(1, right), 4)]]
    names.insert(right, str(rs.choice(world.THEMES[theme])))
    hint = f"Context: The picture shows things from the {theme} collection.\n"
    return hint + questions.lettered("Which of these is in the image?", names) + LETTER, "ABCD"[right]


def mmbench(root: Path, images: list[BenchmarkImage]) -> int:
    """Write MMBench: objects and colors; every rotation of the options is one row."""
    sampler, chosen = QuestionSampler(71), _with_shapes(images)
    base = _choices(sampler, chosen, questions.choice, "object_existence", lambda text: text.endswith(LETTER))
    base += _choices(sampler, chosen, questions.choice_color, "attribute_recognition", lambda text: True)
    return _table(root, "mmbench/mmbench_dev_20230712.tsv", base)


def mmbench_cn(root: Path, images: list[BenchmarkImage]) -> int:
    """Write MMBench-CN: two questions in Chinese about the objects of each image."""
    sampler, chosen, base = QuestionSampler(72), _with_shapes(images), []
    for _ in range(2):
        base += _choices(
            sampler, chosen, questions.choice, "object_existence", lambda text: text.endswith(LETTER_CN)
        )
    return _table(root, "mmbench_cn/mmbench_dev_cn_20231003.tsv", base)


def _with_shapes(images: list[BenchmarkImage]) -> list[BenchmarkImage]:
    """Return the first images with a shape, up to the fraction `FEW`."""
    found = [image for image in images if image.scene.names("shape")]
    return found[: max(1, round(FEW * len(images)))]


def _choices(
    sampler: QuestionSampler,
    images: list[BenchmarkImage],
    maker: Maker,
    category: str,
    fits: Callable[[str], bool],
) -> list[tuple[BenchmarkImage, str, str, str]]:
    """Sample (image, question with its instruction, letter, category); most have four options."""
    found = []
    for index, image in enumerate(images):
        number = (4, 4, 3, 4, 2)[index % 5]
        right = "ABCD"[index % number]
        drawn = sampler.sample(
            maker,
            image,
            lambda text, letter, number=number, right=right: (
                fits(text) and letter == right and len(parsed(text)[2]) == number
            ),
        )
        if drawn:
            found.append((image, *drawn, category))
    return found


def _table(root: Path, name: str, base: list[tuple[BenchmarkImage, str, str, str]]) -> int:
    """Write the table of MMBench: all questions, then their rotations.

    Every row contains its image as base64, as in the official releases: LLaVA's and other programs read no
    reference to the image of another row.
    """
    base = sorted(base, key=lambda row: row[0].number)
    rows = []
    for turn in range(4):
        for index, (image, text, letter, category) in enumerate(base):
            _, question, options = parsed(text)
            count = len(options)
            if turn >= count:
                continue
            turned = [options[(position - turn) % count] for position in range(count)]
            answer = "ABCD"[("ABCD".index(letter) + turn) % count]
            rows.append(
                [
                    index + turn * ROTATION,
                    question,
                    "",
                    *turned,
                    *[""] * (4 - count),
                    answer,
                    category,
                    base64.b64encode((root / IMAGES / image.file).read_bytes()).decode(),
                    "embedded",
                    _LEVEL,
                    "",
                    "dev",
                ]
            )
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    return len(rows)


_TASKS: dict[str, Maker] = {
    "existence": questions.exist,
    "count": questions.count_check,
    "position": questions.position,
    "color": questions.color_check,
}


def mme(root: Path, images: list[BenchmarkImage]) -> int:
    """Write MME: pairs of a yes and a no about one image (existence, count, position, color).

    As in LLaVA's file, prompts lack the instruction "Please answer yes or no." of the label files.
    """
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    wanted, asked = max(1, round(FEW * len(images))), []
    for salt, (task, maker) in enumerate(_TASKS.items(), 81):
        (release / task / "questions_answers_YN").mkdir(parents=True, exist_ok=True)
        for old in (release / task / "questions_answers_YN").glob("*.txt"):
            old.unlink()
        link_images(root, f"MME/{release.name}/{task}/images")
        sampler, done = QuestionSampler(salt), 0
        for image in images[salt % 4 :: 2]:
            pair = _pair(sampler, maker, image, done % 2 == 0) if done < wanted else None
            if pair is None:
                continue
            done += 1
            name = f"{task}/images/{image.file}"
            asked += [
                {"question_id": name, "image": name, "text": text, "category": task} for text, _ in pair
            ]
            labels = "".join(f"{text.removesuffix(SHORT)}{MME_TAIL}\t{answer}\n" for text, answer in pair)
            (release / task / "questions_answers_YN" / f"{Path(image.file).stem}.txt").write_text(
                labels, encoding="utf-8"
            )
    write_jsonl(folder / "llava_mme.jsonl", asked)
    return len(asked)


def _pair(
    sampler: QuestionSampler, maker: Maker, image: BenchmarkImage, yes_first: bool
) -> list[tuple[str, str]] | None:
    """Sample a yes and a no, about the same objects unless the task is existence; None without one."""
    first = sampler.sample(maker, image, lambda _, answer: answer == "Yes")
    if first is None:
        return None
    second = sampler.sample(
        maker,
        image,
        lambda text, answer: (
            answer == "No"
            and (maker is questions.exist or mentioned_objects(text) == mentioned_objects(first[0]))
        ),
    )
    if second is None:
        return None
    return [first, second] if yes_first else [second, first]

"""Embedded sets of letters and of pairs: ScienceQA, MMBench in two languages, MME.

Every function takes the root of all sets and its pictures, writes the official files and returns the number
of questions. Letters are dealt out in turn, so that none is right more often than the others.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import questions, world
from .questions import LETTER, LETTER_CN, MME_TAIL, SHORT, Maker
from .suites import PICTURES, Asker, Picture, link, subject, write_json, write_jsonl

TEXT_ONLY = 0.2  # ScienceQA's items without a picture, per picture
FEW = 0.2  # of the pictures: MMBench carries them inside, MME asks its pairs about so many per task
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
    """(lines before the question, question, options) of a multiple-choice question with its tail."""
    lines = text.split("\n")[:-1]
    options = [line[3:] for line in lines if line[1:3] == ". "]
    *before, question = lines[: len(lines) - len(options)]
    return before, question, options


def scienceqa(root: Path, pictures: list[Picture]) -> int:
    """A question about every picture, with a hint; some without a picture, which the hint alone answers."""
    folder, asker = root / "scienceqa", Asker(61)
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

    for number, picture in enumerate(pictures):
        drawn = asker.draw(
            questions.science, picture, lambda _, answer, wanted="ABCD"[number % 4]: answer == wanted
        )
        assert drawn, f"no question about picture {picture.number}"
        add(*drawn, picture.file)
    for number in range(max(1, round(TEXT_ONLY * len(pictures)))):
        add(*_by_hint(number), None)
    link(root, "scienceqa/images/test")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "llava_test_CQM-A.json", asked)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})
    return len(asked)


def _by_hint(number: int) -> tuple[str, str]:
    """A question without a picture: one option is of the theme that the hint names. Letters go round."""
    rs = np.random.RandomState([62, number])
    right = number % 4
    theme = list(world.THEMES)[rs.randint(len(world.THEMES))]
    others = [name for one, names in world.THEMES.items() if one != theme for name in names]
    names = [str(name) for name in rs.permutation(others)[: rs.randint(max(1, right), 4)]]
    names.insert(right, str(rs.choice(world.THEMES[theme])))
    hint = f"Context: The picture shows things from the {theme} collection.\n"
    return hint + questions.lettered("Which of these is in the image?", names) + LETTER, "ABCD"[right]


def mmbench(root: Path, pictures: list[Picture]) -> int:
    """What is there, and the colour of a shape; every rotation of the options is a row."""
    asker, chosen = Asker(71), _with_shapes(pictures)
    base = _choices(asker, chosen, questions.choice, "object_existence", lambda text: text.endswith(LETTER))
    base += _choices(asker, chosen, questions.choice_color, "attribute_recognition", lambda text: True)
    return _table(root, "mmbench/mmbench_dev_20230712.tsv", base)


def mmbench_cn(root: Path, pictures: list[Picture]) -> int:
    """What is there, in Chinese: two questions a picture."""
    asker, chosen, base = Asker(72), _with_shapes(pictures), []
    for _ in range(2):
        base += _choices(
            asker, chosen, questions.choice, "object_existence", lambda text: text.endswith(LETTER_CN)
        )
    return _table(root, "mmbench_cn/mmbench_dev_cn_20231003.tsv", base)


def _with_shapes(pictures: list[Picture]) -> list[Picture]:
    """The first pictures that have a shape, as many as a set takes that is not about all of them."""
    found = [picture for picture in pictures if picture.scene.names("shape")]
    return found[: max(1, round(FEW * len(pictures)))]


def _choices(
    asker: Asker, pictures: list[Picture], maker: Maker, category: str, fits: Callable[[str], bool]
) -> list[tuple[Picture, str, str, str]]:
    """(picture, question with its tail, letter, category); mostly four options, letters in turn."""
    found = []
    for place, picture in enumerate(pictures):
        number = (4, 4, 3, 4, 2)[place % 5]
        right = "ABCD"[place % number]
        drawn = asker.draw(
            maker,
            picture,
            lambda text, letter, number=number, right=right: (
                fits(text) and letter == right and len(parsed(text)[2]) == number
            ),
        )
        if drawn:
            found.append((picture, *drawn, category))
    return found


def _table(root: Path, name: str, base: list[tuple[Picture, str, str, str]]) -> int:
    """Write MMBench's table: all questions, then their rotations; a picture stands in one row only.

    Later rows about the same picture hold the index of that row, as official releases do.
    """
    base = sorted(base, key=lambda row: row[0].number)
    inside: dict[int, int] = {}
    rows = []
    for turn in range(4):
        for index, (picture, text, letter, category) in enumerate(base):
            _, question, options = parsed(text)
            count = len(options)
            if turn >= count:
                continue
            if picture.number in inside:
                image = str(inside[picture.number])
            else:
                image = base64.b64encode((root / PICTURES / picture.file).read_bytes()).decode()
                inside[picture.number] = index
            turned = [options[(place - turn) % count] for place in range(count)]
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
                    image,
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


def mme(root: Path, pictures: list[Picture]) -> int:
    """Pairs of a yes and a no about one picture: existence, count, position and colour.

    As in LLaVA's file, the prompt lacks the tail "Please answer yes or no." that the labels have.
    """
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    wanted, asked = max(1, round(FEW * len(pictures))), []
    for salt, (task, maker) in enumerate(_TASKS.items(), 81):
        (release / task / "questions_answers_YN").mkdir(parents=True, exist_ok=True)
        for old in (release / task / "questions_answers_YN").glob("*.txt"):
            old.unlink()
        link(root, f"MME/{release.name}/{task}/images")
        asker, done = Asker(salt), 0
        for picture in pictures[salt % 4 :: 2]:
            pair = _pair(asker, maker, picture, done % 2 == 0) if done < wanted else None
            if pair is None:
                continue
            done += 1
            name = f"{task}/images/{picture.file}"
            asked += [
                {"question_id": name, "image": name, "text": text, "category": task} for text, _ in pair
            ]
            labels = "".join(f"{text.removesuffix(SHORT)}{MME_TAIL}\t{answer}\n" for text, answer in pair)
            (release / task / "questions_answers_YN" / f"{Path(picture.file).stem}.txt").write_text(
                labels, encoding="utf-8"
            )
    write_jsonl(folder / "llava_mme.jsonl", asked)
    return len(asked)


def _pair(asker: Asker, maker: Maker, picture: Picture, yes_first: bool) -> list[tuple[str, str]] | None:
    """A yes and a no, about the same things unless things are what is asked for; None without."""
    first = asker.draw(maker, picture, lambda _, answer: answer == "Yes")
    if first is None:
        return None
    second = asker.draw(
        maker,
        picture,
        lambda text, answer: (
            answer == "No" and (maker is questions.exist or subject(text) == subject(first[0]))
        ),
    )
    if second is None:
        return None
    return [first, second] if yes_first else [second, first]

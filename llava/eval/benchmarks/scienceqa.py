"""ScienceQA: multiple choice from school books; `scienceqa` asks the questions with an image (SQA-IMG).

`scienceqa_full` asks all 4,241 test questions. Score: IMG-Accuracy by LLaVA's rule: the answer is a letter
alone, a letter before ". ", or "The answer is X."; anything else is wrong. Accuracy counts every question of
the split, answered or not. IMG-Accuracy counts the questions whose *answer* has `<image>` in its prompt, so
missing answers shrink its denominator silently; a warning counts them.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import LETTER_ANSWER, Benchmark, DataFile, Score, mean
from .files import DataError, DataIssue, Question, Row, read_json
from .normalize import cleaned
from .questions import make_question
from .shapes import ID, Shape, mismatch

ALL, WITH_IMAGE = "llava_test_CQM-A.json", "llava_test_CQM-I.json"
SPLITS, PROBLEMS = "pid_splits.json", "problems.json"
OPTIONS = "ABCDE"
FAILED = "FAILED"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in the original
# What a person reads as a letter: "(b)", "B!", "B) red", "B, because ..."; "the answer is B", "option B".
_LETTER = re.compile(r"[(\[]?(?:([A-E])(?=$|[.:)\],;!?\n])|([a-e])(?=[.:)\]!]*$))")
_SEVERAL = re.compile(r"\W*(?:and|or)?\W*[A-E]\b(?!['\u2019])")  # after a letter: "A, B" names two
_NAMED = re.compile(r"(?:answer is|answer:|option)\s*:?\s*\(?([A-E])\b", re.I)
QUESTION: Shape = {"id": ID, "image?": object, "conversations": [{"value": str}]}
PROBLEM: Shape = {"question": str, "choices": [str], "answer": int, "image?": (str, type(None))}
_PAGE = "ScienceQA (scienceqa.github.io)"


def parse_answer(text: str) -> str:
    """Return the letter of an answer by LLaVA's rule, or FAILED."""
    if text[:1] and text[0] in OPTIONS and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def choice_index(letter: str, choices: list[str]) -> int:
    """Return the index of a letter among the choices; -1 for letters after the last one and for FAILED."""
    return OPTIONS.index(letter) if letter in tuple(OPTIONS[: len(choices)]) else -1


def right(entry: Row, row: Row) -> float:
    """Return 1 for a right answer, else 0."""
    return float(choice_index(parse_answer(row["text"]), entry["choices"]) == entry["answer"])


def read_conversations(
    path: Path,
    images: Path,
    problems: list[DataIssue],
    suffix: str,
    only_images: bool = False,
    allow_outside: bool = False,
) -> Iterator[Question]:
    """Stream LLaVA's question file, a JSON list of conversations; the human turn is the question.

    Args:
        images: Folder of the images.
        problems: Receives the entries that cannot be used.
        suffix: Instruction at the end of every prompt.
        only_images: Leave out questions without an image.
        allow_outside: Accept images outside `images`.

    Raises:
        DataError: The file is missing, or not such a list.
    """
    index = 0
    for number, row in enumerate(read_json(path, list), 1):
        problem = mismatch(row, QUESTION)
        if not problem and not row["conversations"]:
            problem = "entry without a human turn"
        if problem:
            problems.append(DataIssue(str(path), number, problem.lstrip(".: ")))
            continue
        image, value = row.get("image"), row["conversations"][0]["value"]
        if image is None and only_images and "<image>" not in value:
            continue
        text = value.replace("<image>", "").strip() + suffix
        try:
            if (image is None) == ("<image>" in value):
                raise ValueError(f"entry {row['id']} has only one of <image> and an image file")
            # the scorer recognizes questions with an image by their prompt
            extra = {"prompt": text if image is None else "<image>\n" + text}
            values = row["id"], image, text, images, allow_outside
            question = make_question(index, *values, file=str(path), line=number, extra=extra)
        except ValueError as error:
            problems.append(DataIssue(str(path), number, str(error)))
            continue
        yield question
        index += 1


def read_split(name: str, splits: Path, path: Path) -> dict[str, Row]:
    """Return {id: problem} of a split. Raises DataError."""
    split = [str(key) for key in read_json(splits, dict, {name: [ID]})[name]]
    problems = read_json(path, dict, {str: PROBLEM})
    if not split:
        raise DataError(f"{splits}: {name} lists no questions. Use the official file, or another split.")
    missing = [key for key in split if key not in problems]
    if missing:
        what = f"{len(missing)} of {len(split)} questions of {splits.name} are missing"
        raise DataError(f"{path}: {what}. Use the files of one release.")
    for key in split:
        choices, answer = len(problems[key]["choices"]), problems[key]["answer"]
        if not 0 <= answer < choices:
            what = f"problem {key}: answer is {answer}, expected an index of its {choices} choices"
            raise DataError(f"{path}: {what}. Use the official file.")
    return {key: problems[key] for key in split}


class ScienceQA(Benchmark):
    name = "scienceqa"
    title = "ScienceQA-IMG"
    folder = "scienceqa"
    other_folders = ("sqa",)
    metric = "accuracy"
    max_new_tokens = 1024
    marker = ALL
    markers = (WITH_IMAGE, PROBLEMS)
    sizes = {4241: "test", 2017: "test, questions with an image"}
    files = (
        DataFile(ALL, "questions", also=(WITH_IMAGE,)),
        DataFile(PROBLEMS, "choices and answers", _PAGE, "score"),
        DataFile(SPLITS, "ids of the test split", _PAGE, "score"),
        DataFile("images/test", "images", _PAGE),
    )
    truth_files = (SPLITS, PROBLEMS)
    constant_answers = tuple(OPTIONS)
    only_images = True

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        path = self.find(data, ALL)
        if path.name != ALL and not self.only_images:
            raise DataError(f"{data / ALL}: not found. {path.name} contains only questions with an image.")
        images = path.parent / "images" / "test"
        return read_conversations(path, images, problems, LETTER_ANSWER, self.only_images, self.allow_outside)

    @staticmethod
    def read_truth(splits: Path, path: Path) -> dict[str, Row]:
        """Return {id: problem} of the test split."""
        return read_split("test", splits, path)

    def wanted(self, data: Path) -> tuple[()]:
        return ()  # `score` distinguishes questions with and without image

    def key(self, row: Row) -> str:
        if "prompt" not in row:  # the official scorer raises as well
            raise DataError(
                f"{self.title}: the answer to question_id {row['question_id']!r} has no prompt. The official "
                "scorer finds the questions with an image by their prompt. Keep the key 'prompt'."
            )
        return str(row["question_id"])

    def credit(self, entry: Row, row: Row) -> float | None:
        return right(entry, row) if "<image>" in str(row.get("prompt", "")) else None

    def asked_texts(self, data: Path) -> Mapping[Hashable, Sequence[str]]:
        return {
            key: (entry["question"], *map("{}. {}".format, OPTIONS, entry["choices"]))
            for key, entry in self.truth(data).items()
        }

    def entries(self, data: Path, answers: Sequence[Row]) -> list[Any]:
        return [self.truth(data).get(key) for key in self.keys(data, answers)]

    def reading(self, entry: Any, text: str) -> int:
        return choice_index(parse_answer(text), entry["choices"] if entry else OPTIONS)

    def careful(self, entry: Any, text: str) -> str | None:
        if self.reading(entry, text) >= 0:
            return text
        text, choices = cleaned(text), entry["choices"] if entry else OPTIONS
        plain = text.casefold().rstrip(".!")
        texts = dict(zip(OPTIONS, (one.casefold().rstrip(".!") for one in choices), strict=False))
        if found := _LETTER.match(text):
            letters = {(found[1] or found[2]).upper()}
            if _SEVERAL.match(text, found.end()):
                return None
        else:
            letters = {letter.upper() for letter in _NAMED.findall(text)}
            letters = letters or {
                one for one in texts if plain in (texts[one], f"{one.lower()} {texts[one]}")
            }
        return letters.pop() if len(letters) == 1 and letters <= texts.keys() else None

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        truth = self.truth(data)
        rows, warnings, _ = self.join(data, answers)
        correct = int(sum(right(truth[key], row) for key, row in rows.items()))
        with_image = [key for key, entry in truth.items() if entry.get("image")]
        images = [one.value for one in self.question_scores(data, answers)]
        marked = {key for key, row in rows.items() if "<image>" in row["prompt"]}
        if marked and (wrong := (marked ^ {*with_image}) & rows.keys()):
            effect = "--fixed counts by problems.json"
            if fixed:
                effect = "counted by problems.json"
                images = [right(truth[key], rows[key]) for key in with_image if key in rows]
            what = (
                f"{len(wrong)} answers have <image> in their prompt and no image in problems.json, or reverse"
            )
            warnings.append(f"{what}; the official IMG-Accuracy counts by the prompt; {effect}")
        details: dict[str, Any] = {
            "count": len(truth),
            "correct": correct,
            "accuracy": 100 * correct / (len(rows) if fixed and rows else len(truth)),
            "img_count": len(images),
            "img_correct": int(sum(images)),
            "img_accuracy": 100 * mean(images) if images else None,
            "unparsed": sum(parse_answer(row["text"]) == FAILED for row in rows.values()),
        }
        if not images:
            warnings.append(
                "no answer has <image> in its prompt, so that the official IMG-Accuracy is undefined"
            )
        if missing := sum(key not in rows for key in with_image):
            what = f"{missing} of {len(with_image)} questions with an image have no answer"
            warnings.append(f"{what}; IMG-Accuracy is that of the others")
        if missing := len(truth) - len(rows) - missing:
            effect = "" if fixed else "; the overall accuracy counts them as wrong and is not meaningful"
            warnings.append(f"{missing} questions without an image have no answer{effect}")
        return Score(self.name, details["img_accuracy"], details, warnings)


class ScienceQAFull(ScienceQA):
    """All test questions, with and without an image."""

    name = "scienceqa_full"
    title = "ScienceQA"
    asks_without_image = True
    only_images = False

"""MME: two yes/no questions per image; ten perception and four cognition tasks.

Score: the perception sum (at most 2,000), which papers report; cognition is in the details. A task scores
100 x accuracy + 100 x accuracy+ (both questions of an image right), at most 200.

Official rules: answers are stored in one text file per task, which a tab or line break in an answer breaks;
lines are paired *by position*; only the first four characters of an answer count; a task without any yes or
no makes the calculator stop on current scikit-learn. The default reproduces its score and warns where a rule
applies; `fixed` pairs by image and scores such a task by its accuracy, 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .base import SHORT_ANSWER, Benchmark, DataFile, Score, Submission, grouped, mean, ratio
from .files import DataError, Row, read_text
from .normalize import yes_or_no

PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PARTS = {"perception": PERCEPTION, "cognition": COGNITION}
TASKS = PERCEPTION + COGNITION
QUESTIONS, RELEASE = "llava_mme.jsonl", "MME_Benchmark_release_version"
# What prompts have around a question: the image, LLaVA's instruction, or the official one.
_AROUND = re.compile(rf"<image>|{SHORT_ANSWER.strip()}|Please answer yes or no\.?\s*$", re.I)
# One line of a task's result file: label file (one per image), question, Yes or No, answer.
Line = tuple[str, str, str, str]


def parse_answer(text: str) -> str:
    """Return yes, no or other by the first four characters; "yes" is looked for first."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def task_score(pairs: list[list[Line]]) -> Row:
    """Return counts and accuracies of one task, given the lines of each image."""
    right, counts = [], dict.fromkeys(("TP", "FN", "TN", "FP", "other"), 0)
    for pair in pairs:
        said = [(parse_answer(text), label.lower()) for _, _, label, text in pair]
        right.append([predicted == label for predicted, label in said])
        for predicted, label in said:
            outcome = ("T" if predicted == label else "F") + ("P" if predicted == "yes" else "N")
            counts["other" if predicted == "other" else outcome] += 1
    accuracies = {"acc": mean(sum(right, [])), "acc_plus": mean(map(all, right))}
    return {"n_images": len(pairs), **accuracies, **counts}


def bare(prompt: str) -> str:
    """Return the question of a prompt or label file, without the instructions around it."""
    return _AROUND.sub("", _AROUND.sub("", prompt).strip()).strip()


def unreadable(answers: list[Row]) -> list[str]:
    """Return what the official calculator cannot read, if there is anything."""
    broken = sum(_breaks_lines(row["text"]) for row in answers)
    return [f"{broken} answers contain a tab or a line break"] if broken else []


def _breaks_lines(text: str) -> bool:
    return "\t" in text or "\n" in text


class MME(Benchmark):
    name = "mme"
    title = "MME"
    folder = "MME"
    other_folders = ("mme",)
    unit = "points"
    metric = "perception"
    marker = QUESTIONS
    markers = (RELEASE,)
    image_folder = RELEASE
    sizes = {2374: "full release"}
    files = (
        DataFile(QUESTIONS, "questions"),
        DataFile(RELEASE, "images and labels", "MME (github.com/BradyFU, Awesome-Multimodal-LLMs)"),
    )
    truth_files = (RELEASE,)
    key_name = "image and question"
    repeats = "the official calculator counts each, --fixed only the last one"
    constant_answers = ("Yes", "No")

    @staticmethod
    def read_truth(release: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
        """Return {(task, label file, question without suffix): (question in the label file, Yes or No)}."""
        labels = {}
        for task in TASKS:
            nested = release / task / "questions_answers_YN"
            for path in sorted((nested if nested.is_dir() else release / task).glob("*.txt")):
                if path.name[0] == ".":  # macOS writes "._0001.txt" next to every file on other disks
                    continue
                for number, line in enumerate(read_text(path).split("\n"), 1):
                    if not line.strip():
                        continue
                    cells = line.rstrip().split("\t")
                    if len(cells) != 2 or cells[1] not in ("Yes", "No"):
                        what = f"expected a question, a tab, and Yes or No, got {line[:60]!r}"
                        raise DataError(
                            f"{path}:{number}: {what}. Fix the line, or remove a file of no image."
                        )
                    key = task, path.name, bare(cells[0])
                    if labels.setdefault(key, tuple(cells))[1] != cells[1]:
                        raise DataError(
                            f"{path}:{number}: repeats a question with another label. Remove one."
                        )
        if not labels:
            raise DataError(f"{release}: no labels in <task>/*.txt or <task>/questions_answers_YN/*.txt")
        return labels

    def key(self, row: Row) -> tuple[str, str, str]:
        if "prompt" not in row:
            raise DataError(
                f"{self.title}: the answer to question_id {row['question_id']!r} has no prompt. Two "
                "questions share an image; use an answer file with the key 'prompt'."
            )
        task, _, name = str(row["question_id"]).partition("/")
        file = name.split("/")[-1].split(".")[0] + ".txt"
        return task, file, bare(row["prompt"])

    def credit(self, entry: tuple[str, str], row: Row) -> float:
        return float(parse_answer(row["text"]) == entry[1].lower())

    def _lines(self, data: Path, answers: list[Row], fixed: bool = False) -> dict[str, list[Line]]:
        """Return {task: result lines} in the order of the answers."""
        truth, counted = self.truth(data), self.counted(data, answers, fixed)
        return grouped((key[0], (key[1], *truth[key], row["text"])) for key, row in counted)

    def reading(self, entry: Any, text: str) -> str:
        return "broken line" if _breaks_lines(text) else parse_answer(text)

    def careful(self, entry: Any, text: str) -> str | None:
        said = yes_or_no(text)
        return said and said.capitalize()

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        warnings = self.join(data, answers).warnings
        raises, detail, points = unreadable(answers), {}, {}
        for task, lines in self._lines(data, answers, fixed).items():
            if fixed:
                pairs = list(grouped((line[0], line) for line in lines).values())
            else:
                pairs = [lines[place : place + 2] for place in range(0, len(lines), 2)]
                mixed = [pair for pair in pairs if len(pair) < 2 or pair[0][0] != pair[1][0]]
                if mixed:
                    warnings.append(
                        f"{task}: {len(mixed)} of {len(pairs)} pairs are not of one image (first: "
                        f"{' and '.join(line[0] for line in mixed[0])}). The official calculator pairs by "
                        "position without checking, so accuracy+ is not valid. --fixed pairs by image"
                    )
            detail[task] = found = task_score(pairs)
            points[task] = 100 * found["acc"] + 100 * found["acc_plus"]
            if len(lines) % 2:
                raises.append(f"{task} has an odd number of answers")
            if found["other"] == len(lines):
                raises.append(f"no answer of {task} is a yes or no")
        rule = "fixed: paired by image" if fixed else "official: paired by position"
        details: dict[str, Any] = {"rule": rule}
        for part, names in PARTS.items():
            scores = {task: points[task] for task in names if task in points}
            details[part] = {"total": sum(scores.values()), "subtasks": scores}
            if 0 < len(scores) < len(names):
                absent = ", ".join(task for task in names if task not in scores)
                what = f"{part} is the sum of {len(scores)} of {len(names)} tasks"
                warnings.append(f"{what}; no answers for {absent}")
        details["detail"] = detail
        if raises and not fixed:
            return self.stopped(details, warnings, raises[0])
        perception = details["perception"]
        return Score(self.name, perception["total"] if perception["subtasks"] else None, details, warnings)

    def image_counts(self, data: Path, answers: list[Row]) -> Iterable[tuple[str, np.ndarray]]:
        """Yield (image, counts (tasks, 4)): right answers, answers, images all right, images."""
        values = grouped((one.image, one.value) for one in self.question_scores(data, answers))
        for image, inside in values.items():
            counts = np.zeros((len(TASKS), 4))
            counts[TASKS.index(image.split("/")[0])] = sum(inside), len(inside), all(inside), 1
            yield image, counts

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return perception points (...) of counts (..., tasks, 4)."""
        right, asked, both, images = np.moveaxis(counts[..., : len(PERCEPTION), :], -1, 0)
        return 100 * (ratio(right, asked) + ratio(both, images)).sum(-1)

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return one `<task>.txt` per task, which the official calculator reads."""
        warnings = self.join(self.needed(data), answers).warnings
        warnings += [f"{what}, which the calculator cannot read" for what in unreadable(answers)]
        files = {
            f"{task}.txt": "".join("\t".join(line) + "\n" for line in lines).encode()
            for task, lines in self._lines(data, answers).items()
        }
        return Submission(files, len(answers), "MME's eval_tool (calculation.py --results_dir)", warnings)

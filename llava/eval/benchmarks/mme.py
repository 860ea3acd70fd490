"""MME: two yes/no questions per image; ten perception and four cognition tasks.

Score: the perception sum (at most 2,000), which papers report; cognition is in the details. A task scores
100 x accuracy + 100 x accuracy+ (both questions of an image right), at most 200.

Official rules: answers are stored in one text file per task, which a tab or line break in an answer breaks;
lines are paired *by position*; only the first four characters of an answer count; a task without any yes or
no makes the calculator stop on current scikit-learn. The default reproduces its score and warns where a rule
applies; `fixed` pairs by image and scores such a task by its accuracy, 0.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava.eval.benchmarks.base import SHORT_ANSWER, Benchmark, DataFile, PerImageCounts, Score, Submission
from llava.eval.benchmarks.files import DataError, Row

PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PARTS = {"perception": PERCEPTION, "cognition": COGNITION}
TASKS = PERCEPTION + COGNITION
QUESTIONS, RELEASE = "llava_mme.jsonl", "MME_Benchmark_release_version"
_SUFFIX = "Please answer yes or no."


class ResultLine(NamedTuple):
    """One line of a task's result file."""

    file: str  # name of the label file, one per image
    question: str
    label: str  # Yes or No
    text: str

    def right(self) -> bool:
        return parse_answer(self.text) == self.label.lower()


def parse_answer(text: str) -> str:
    """Return yes, no or other by the first four characters; "yes" is looked for first."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def task_score(pairs: list[list[ResultLine]]) -> Row:
    """Return counts and accuracies of one task, given the lines of each image."""
    found: Row = {"n_images": len(pairs), "acc": 0.0, "acc_plus": 0.0}
    found |= dict.fromkeys(("TP", "FN", "TN", "FP", "other"), 0)
    lines = [line for pair in pairs for line in pair]
    for line in lines:
        predicted = parse_answer(line.text)
        outcome = ("T" if line.right() else "F") + ("P" if predicted == "yes" else "N")
        found["other" if predicted == "other" else outcome] += 1
    if pairs:
        found["acc"] = sum(line.right() for line in lines) / len(lines)
        found["acc_plus"] = sum(all(line.right() for line in pair) for pair in pairs) / len(pairs)
    return found


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
    constant_answers = ("Yes", "No")

    @staticmethod
    def read_truth(release: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
        """Return {(task, label file, question without suffix): (question in the label file, Yes or No)}."""
        labels = {}
        for task in TASKS:
            nested = release / task / "questions_answers_YN"
            for path in sorted((nested if nested.is_dir() else release / task).glob("*.txt")):
                for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
                    if not line.strip():
                        continue
                    question, _, label = line.rstrip().rpartition("\t")
                    if label not in ("Yes", "No"):
                        raise DataError(f"{path}:{number}: expected a question, a tab, and Yes or No")
                    labels[task, path.name, question.removesuffix(_SUFFIX).strip()] = question, label
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
        return task, file, row["prompt"].replace(SHORT_ANSWER.strip(), "").strip()

    def image_of(self, key: Hashable, entry: Any) -> str:
        return f"{key[0]}/{key[1]}"

    def credit(self, entry: tuple[str, str], row: Row) -> float:
        return float(parse_answer(row["text"]) == entry[1].lower())

    def _lines(self, data: Path, answers: list[Row]) -> dict[str, list[ResultLine]]:
        """Return {task: result lines} in the order of the answers."""
        truth, lines = self.truth(data), {}
        for key, row in zip(self.keys(data, answers), answers, strict=True):
            lines.setdefault(key[0], []).append(ResultLine(key[1], *truth[key], row["text"]))
        return lines

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        warnings = self.join(data, answers).warnings
        lines = self._lines(data, answers)
        broken = _unreadable(lines)
        raises = [f"{broken} answers contain a tab or a line break"] if broken else []
        detail = {}
        for task, inside in lines.items():
            detail[task] = task_score(_pairs(task, inside, fixed, warnings))
            if len(inside) % 2 and not fixed:
                raises.append(f"{task} has an odd number of answers")
            if detail[task]["other"] == len(inside):
                raises.append(f"no answer of {task} is a yes or no")
        details: dict[str, Any] = {
            "rule": "fixed: paired by image" if fixed else "official: paired by position"
        }
        for part, names in PARTS.items():
            scores = {
                task: 100 * detail[task]["acc"] + 100 * detail[task]["acc_plus"]
                for task in names
                if task in detail
            }
            details[part] = {"total": sum(scores.values()), "subtasks": scores}
            if 0 < len(scores) < len(names):
                absent = ", ".join(task for task in names if task not in scores)
                warnings.append(
                    f"{part} is the sum of {len(scores)} of {len(names)} tasks; no answers for {absent}"
                )
        details["detail"] = detail
        if raises and not fixed:
            return self.stopped(details, warnings, raises[0])
        perception = details["perception"]
        return Score(self.name, perception["total"] if perception["subtasks"] else None, details, warnings)

    def per_image_counts(self, data: Path, answers: list[Row]) -> PerImageCounts:
        """Return counts (images, tasks, 4): right answers, answers, images all right, images."""
        table: dict[str, np.ndarray] = {}
        for one in self.question_scores(data, answers):
            counts = table.setdefault(one.image, np.zeros((len(TASKS), 4)))
            counts[TASKS.index(one.image.split("/")[0])] += one.value, 1, 0, 0
        for counts in table.values():
            counts[:, 2] = (counts[:, 1] > 0) & (counts[:, 0] == counts[:, 1])
            counts[:, 3] = counts[:, 1] > 0
        return self._per_image(table)

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return perception points (...) of counts (..., tasks, 4)."""
        right, asked, both, images = (counts[..., : len(PERCEPTION), column] for column in range(4))
        accuracy = np.divide(right, asked, out=np.zeros_like(right), where=asked > 0)
        accuracy += np.divide(both, images, out=np.zeros_like(both), where=images > 0)
        return 100 * accuracy.sum(-1)

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return one `<task>.txt` per task, which the official calculator reads."""
        data = self.needed(data)
        warnings = self.join(data, answers).warnings
        lines = self._lines(data, answers)
        if broken := _unreadable(lines):
            warnings.append(
                f"{broken} answers contain a tab or a line break, which the calculator cannot read"
            )
        files = {
            f"{task}.txt": "".join("\t".join(line) + "\n" for line in inside).encode()
            for task, inside in lines.items()
        }
        server = "MME's eval_tool (calculation.py --results_dir)"
        return Submission(files, len(answers), server, warnings)


def _unreadable(lines: dict[str, list[ResultLine]]) -> int:
    return sum("\t" in line.text or "\n" in line.text for inside in lines.values() for line in inside)


def _pairs(task: str, lines: list[ResultLine], fixed: bool, warnings: list[str]) -> list[list[ResultLine]]:
    """Return the lines of each image: by position, or by label file if `fixed`."""
    if fixed:
        by_file: dict[str, dict[str, ResultLine]] = {}
        for line in lines:
            by_file.setdefault(line.file, {})[line.question] = line
        return [list(pair.values()) for pair in by_file.values()]
    pairs = [lines[place : place + 2] for place in range(0, len(lines), 2)]
    mixed = [pair for pair in pairs if len({line.file for line in pair}) > 1 or len(pair) < 2]
    if mixed:
        warnings.append(
            f"{task}: {len(mixed)} of {len(pairs)} pairs are not of one image (first: "
            f"{' and '.join(line.file for line in mixed[0])}). The official calculator pairs by position "
            "without checking, so accuracy+ is not valid. --fixed pairs by image"
        )
    return pairs

"""MME: yes/no questions in pairs, one picture each; ten perception and four cognition tasks.

Files: `llava_mme.jsonl`, `MME_Benchmark_release_version/<task>/...` (pictures and, as tab separated text, the
labels). A task scores 100 x accuracy + 100 x accuracy+ (both questions of a picture right), at most 200. The
number is the perception sum (at most 2,000), the one that papers print; cognition is in the details.

Official rules, kept: answers pass through one text file per task, so that a tab or line break in an answer
breaks it; lines are paired *by position*; only the first four characters of an answer are looked at; a task
without any yes or no makes the calculator stop on current scikit-learn. The default gives its number and a
warning where a trap bites; `fixed` pairs by picture and counts such a task by its accuracy, 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava.eval.benchmarks.base import (
    Benchmark,
    DataError,
    DataFile,
    DataIssue,
    PerImageCounts,
    Question,
    QuestionScore,
    Score,
    Submission,
    read_questions,
)
from llava.eval.benchmarks.common import LLAVA_EVAL_ZIP, SHORT_ANSWER, check_known, check_pairing, require

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
QUESTIONS, RELEASE = "llava_mme.jsonl", "MME_Benchmark_release_version"
_TAILS = (" Please answer yes or no.", "  Please answer yes or no.")  # some labels have two spaces


class Line(NamedTuple):
    """One line of a task's result file."""

    task: str
    file: str  # the label file's name
    question: str
    label: str  # Yes or No
    text: str

    def __str__(self) -> str:
        return f"{self.file}\t{self.question}\t{self.label}\t{self.text}\n"


def parse_answer(text: str) -> str:
    """yes, no or other: official rule, by the first four characters, "yes" before "no"."""
    begins = text.lower()[:4]
    return "yes" if "yes" in begins else "no" if "no" in begins else "other"


def task_score(pairs: list[list[Line]]) -> dict[str, Any]:
    """Counts and accuracies of one task; `pairs` are the lines of each picture."""
    found: dict[str, Any] = {
        "n_images": len(pairs),
        "acc": 0.0,
        "acc_plus": 0.0,
        "TP": 0,
        "FN": 0,
        "TN": 0,
        "FP": 0,
        "other": 0,
    }
    right = both = 0
    for pair in pairs:
        hits = 0
        for line in pair:
            said, label = parse_answer(line.text), line.label.lower()
            hits += said == label
            if said == "other":
                found["other"] += 1
            else:
                found[("T" if said == label else "F") + ("P" if said == "yes" else "N")] += 1
        right += hits
        both += hits == len(pair)
    if pairs:
        found["acc"], found["acc_plus"] = right / sum(map(len, pairs)), both / len(pairs)
    return found


class MME(Benchmark):
    name = "mme"
    title = "MME"
    folder = "MME"
    other_folders = ("mme",)
    marker = QUESTIONS
    markers = (RELEASE,)
    unit = "points"
    metric = "perception"
    sizes = {2374: "full release"}
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL_ZIP),
        DataFile(RELEASE, "pictures and labels", "MME (github.com/BradyFU, Awesome-Multimodal-LLMs)"),
    )

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where the question file is missing."""
        path = require(data, QUESTIONS, f"LLaVA's question file, from {LLAVA_EVAL_ZIP},")
        return read_questions(path, data / RELEASE, problems)

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        try:
            labels = self._labels(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        keys = [self._key(labels, str(one.question_id), one.text) for one in questions]
        return check_pairing(questions, keys, labels, data / RELEASE)

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        lines, warnings = self._lines(Path(data), answers)
        broken = [line for line in lines if "\t" in line.text or "\n" in line.text]
        tasks: dict[str, list[Line]] = {}
        for line in lines:
            tasks.setdefault(line.task, []).append(line)
        raises = f"{len(broken)} answers hold a tab or a line break" if broken else None
        detail = {}
        for task, inside in tasks.items():
            detail[task] = task_score(self._pairs(task, inside, fixed, warnings))
            if len(inside) % 2 and not fixed:
                raises = raises or f"{task} has an odd number of answers"
            if detail[task]["other"] == len(inside):
                raises = raises or f"no answer of {task} is a yes or no"
        sums = {
            part: self._sum(names, detail)
            for part, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        for part, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
            absent = [task for task in names if task not in detail]
            if absent and len(absent) < len(names):
                warnings.append(
                    f"{part} is the sum of {len(names) - len(absent)} of {len(names)} tasks; "
                    f"there is no answer of {', '.join(absent)}"
                )
        details: dict[str, Any] = {
            "rule": f"{'fixed' if fixed else 'official'}: paired by {'picture' if fixed else 'position'}",
            **sums,
            "detail": detail,
        }
        if raises and not fixed:
            warnings.append(
                f"the official calculator stops here ({raises}) and gives no number; --fixed does"
            )
            details["raises"] = raises
        none = (raises and not fixed) or not sums["perception"]["subtasks"]
        return Score(self.name, None if none else sums["perception"]["total"], details, warnings)

    @staticmethod
    def _sum(names: tuple[str, ...], detail: dict[str, dict]) -> dict[str, Any]:
        scores = {
            task: 100 * detail[task]["acc"] + 100 * detail[task]["acc_plus"]
            for task in names
            if task in detail
        }
        return {"total": sum(scores.values()), "subtasks": scores}

    @staticmethod
    def _pairs(task: str, lines: list[Line], fixed: bool, warnings: list[str]) -> list[list[Line]]:
        by_file: dict[str, dict[str, Line]] = {}
        for line in lines:
            by_file.setdefault(line.file, {})[line.question] = line
        if fixed:
            return [list(pair.values()) for pair in by_file.values()]
        pairs = [lines[place : place + 2] for place in range(0, len(lines), 2)]
        torn = [pair for pair in pairs if len({line.file for line in pair}) > 1 or len(pair) < 2]
        if torn:
            warnings.append(
                f"{task}: {len(torn)} of {len(pairs)} pairs are not of one picture, e.g. "
                f"{' and '.join(line.file for line in torn[0])}; the official calculator pairs "
                "by position, unchecked, and accuracy+ is not to be trusted. --fixed pairs by "
                "picture"
            )
        return pairs

    def per_image_counts(self, data: Path, answers: list[dict[str, Any]]) -> PerImageCounts:
        """counts: (images, tasks, 4): right answers, answers, pictures all right, pictures; paired by id."""
        lines, _ = self._lines(Path(data), answers)
        names = PERCEPTION + COGNITION
        pairs: dict[tuple[str, str], dict[str, Line]] = {}
        for line in lines:
            pairs.setdefault((line.task, line.file), {})[line.question] = line
        counts = np.zeros((len(pairs), len(names), 4))
        for row, ((task, _), pair) in zip(counts, pairs.items(), strict=True):
            right = sum(parse_answer(line.text) == line.label.lower() for line in pair.values())
            row[names.index(task)] = right, len(pair), right == len(pair), 1
        return PerImageCounts(tuple(f"{task}/{file}" for task, file in pairs), counts)

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """(..., tasks, 4) -> (...): perception points."""
        right, asked, both, pictures = (counts[..., : len(PERCEPTION), column] for column in range(4))
        accuracy = np.divide(right, asked, out=np.zeros_like(right), where=asked > 0)
        accuracy += np.divide(both, pictures, out=np.zeros_like(both), where=pictures > 0)
        return 100 * accuracy.sum(-1)

    def constants(self, data: Path) -> list[str]:
        """Yes and no."""
        return ["Yes", "No"]

    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """1 where yes or no is right, cognition included."""
        lines, _ = self._lines(Path(data), answers)
        table = {line[:3]: line for line in lines}
        return [
            QuestionScore(
                "/".join(key),
                f"{line.task}/{line.file}",
                float(parse_answer(line.text) == line.label.lower()),
            )
            for key, line in table.items()
        ]

    def submission(
        self, data: Path | None, answers: list[dict[str, Any]], questions: Path | None = None
    ) -> Submission:
        """One `<task>.txt` per task, what the official calculator reads."""
        if data is None:
            raise DataError("MME's labels are needed: give --data")
        lines, warnings = self._lines(Path(data), answers)
        broken = sum("\t" in line.text or "\n" in line.text for line in lines)
        if broken:
            warnings.append(f"{broken} answers hold a tab or a line break, which the calculator cannot read")
        files: dict[str, str] = {}
        for line in lines:
            files[f"{line.task}.txt"] = files.get(f"{line.task}.txt", "") + str(line)
        return Submission(
            {name: text.encode() for name, text in files.items()},
            len(lines),
            "MME's eval_tool (calculation.py --results_dir)",
            warnings,
        )

    # -- files ------------------------------------------------------------------------------------

    def _lines(self, data: Path, answers: list[dict[str, Any]]) -> tuple[list[Line], list[str]]:
        """Answers with their labels, in answer order, and warnings. Raises DataError for other questions."""
        labels = self._labels(data)
        lacking = [row["question_id"] for row in answers if "prompt" not in row]
        if lacking:
            raise DataError(
                f"{len(lacking)} answers have no prompt, e.g. to {lacking[0]!r}; a question of "
                "MME is known by picture and prompt"
            )
        keys = [self._key(labels, str(row["question_id"]), row["prompt"]) for row in answers]
        warnings = check_known(self.title, keys, labels, data / RELEASE, "picture and question")
        lines = [Line(*key, labels[key], row["text"]) for key, row in zip(keys, answers, strict=True)]
        return lines, warnings

    @staticmethod
    def _key(labels: dict[tuple[str, str, str], str], question_id: str, prompt: str) -> tuple[str, str, str]:
        """(task, label file, question as in the label file) of an answer; it may be unknown."""
        task, _, name = question_id.partition("/")
        file = name.split("/")[-1].split(".")[0] + ".txt"
        bare = prompt.replace(SHORT_ANSWER.strip(), "").strip()
        keys = [(task, file, bare + tail) for tail in _TAILS]
        return keys[1] if keys[1] in labels else keys[0]

    @staticmethod
    def _labels(data: Path) -> dict[tuple[str, str, str], str]:
        """{(task, label file, question): Yes or No} of the release."""
        release = data / RELEASE
        if not release.is_dir():
            raise DataError(f"{release}: no such folder; put MME's release there (pictures and labels)")
        labels = {}
        for task in PERCEPTION + COGNITION:
            nested = release / task / "questions_answers_YN"
            for path in sorted((nested if nested.is_dir() else release / task).glob("*.txt")):
                for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
                    if not line.strip():
                        continue
                    question, _, label = line.rstrip().rpartition("\t")
                    if label not in ("Yes", "No"):
                        raise DataError(f"{path}:{number}: no question, tab, Yes or No")
                    labels[task, path.name, question] = label
        if not labels:
            raise DataError(f"{release}: holds no labels (<task>/*.txt, <task>/questions_answers_YN/*.txt)")
        return labels

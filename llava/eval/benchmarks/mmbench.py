"""MMBench and MMBench-CN (dev): multiple choice, asked once per rotation of the options.

Files: `mmbench_dev_20230712.tsv` and `mmbench_dev_cn_20231003.tsv`, pictures inside as base64. The
rotations are rows already (index + k x 10^6). The number is CircularEval's accuracy: a question counts only
if every rotation is answered right. It is computed here with exact matching, which needs no judge as LLaVA
answers in bare letters; the server takes the xlsx that `python -m llava.eval.submit` writes.

The file is streamed: a picture is read when it is shown, and pictures that are equal count as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import (
    DataError,
    DataFile,
    DataIssue,
    Question,
    QuestionScore,
    Score,
    Submission,
    read_answers,
)
from llava.eval.benchmarks.common import MeanBenchmark, check_known, group_means, mean
from llava.eval.benchmarks.tsv import MISSING_CELLS, EmbeddedImage, is_missing, rows_of

OPTIONS = "ABCD"
ROTATION = 1_000_000
SERVER = "MMBench's server (mmbench.opencompass.org.cn), dev"
_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_IS = re.compile(r"answer is\s*\**([A-Z])\b", re.I)
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")  # no cell can hold these


def infer_letter(text: str, choices: dict[str, str]) -> str | None:
    """The option that an answer means, by exact matching; Z for a refusal, None where it stays open."""
    if "Failed to obtain answer via API" in text:
        return None
    if any(phrase in text for phrase in _REFUSALS):
        return "Z"
    words = text.translate(_MARKS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    found = _IS.search(text)
    if found and found.group(1).upper() in choices:
        return found.group(1).upper()
    lower = {letter: str(option).lower() for letter, option in choices.items()}
    if len(text) > 2 * sum(len(option) for option in lower.values()):
        return None
    inside = [letter for letter, option in lower.items() if option in text.lower()]
    return inside[0] if len(inside) == 1 else None


class MMBench(MeanBenchmark):
    name = "mmbench"
    title = "MMBench"
    folder = "mmbench"
    marker = "mmbench_dev_20230712.tsv"
    metric = "accuracy"
    max_new_tokens = 1024
    sizes = {4377: "dev 20230712", 4329: "dev 20231003"}
    others = "mmbench_dev_[e2]*.tsv"  # other releases
    files = (
        DataFile(
            marker,
            "questions, pictures and answers",
            "MMBench dev, release 20230712 (github.com/open-compass/MMBench)",
            also=(others,),
        ),
    )
    instruction = "\nAnswer with the option's letter from the given choices directly."

    def owns(self, folder: Path) -> bool:
        return (folder / self.marker).is_file() or any(folder.glob(self.others))

    def table(self, data: Path) -> Path:
        """The TSV: the release of the papers, else the latest other one. Raises DataError."""
        if (data / self.marker).is_file():
            return data / self.marker
        found = sorted(data.glob(self.others))
        if not found:
            raise DataError(f"{data / self.marker}: no such file; put {self.title} dev there")
        return found[-1]

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Every row once, in file order; raises DataError where the file is missing or another."""
        return self._questions(self.table(data), problems)

    def _questions(self, path: Path, problems: list[DataIssue]) -> Iterator[Question]:
        pictures: dict[str, EmbeddedImage] = {}
        for index, (number, image, row) in enumerate(rows_of(path, problems)):
            if isinstance(image, str):  # some releases refer to the picture of another row
                if image not in pictures:
                    problems.append(
                        DataIssue(
                            str(path), number, f"refers to the picture of row {image}, which has not come yet"
                        )
                    )
                    continue
                image = pictures[image]
            pictures[row["index"]] = image
            letters = _options(row)
            prompt = row["question"] + "".join(f"\n{letter}. {text}" for letter, text in letters.items())
            if not is_missing(row.get("hint", "")):
                prompt = f"{row['hint']}\n{prompt}"
            extra = {
                "prompt": prompt,
                "round_id": 0,
                "options": list(letters.values()),
                "option_char": list(letters),
            }
            yield Question(
                index,
                int(row["index"]),
                image,
                prompt + self.instruction,
                row.get("category", "default"),
                str(path),
                number,
                extra,
            )

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        path = self.table(data)
        warnings = []
        if path.name != self.marker:
            warnings.append(f"{path.name} is another release than the papers' {self.marker}")
        known = {question.question_id for question in questions}
        torn = sum(1 for key in known if key >= ROTATION and key % ROTATION not in known)
        if torn:
            warnings.append(f"{torn} of {len(known)} rows are rotations of questions that are not there")
        if not any(key >= ROTATION for key in known) and len(known) > 1:
            warnings.append(
                "no row is a rotation (index from 1,000,000 on): a release without circular "
                "rows, or only the first questions; the accuracy is then the vanilla one"
            )
        return warnings

    def load_image(self, image: EmbeddedImage) -> Any:
        """The picture of a row, as RGB. Raises OSError or ValueError that names file and row."""
        return image.load()

    def read_answers(self, path: str | Path) -> list[dict[str, Any]]:
        """LLaVA's jsonl, or an xlsx made for the server."""
        if Path(path).suffix != ".xlsx":
            return read_answers(path)
        from openpyxl import load_workbook

        rows = list(load_workbook(path, read_only=True).active.iter_rows(values_only=True))
        if not rows or not {"index", "prediction"} <= set(rows[0]):
            raise DataError(f"{path}: no columns index and prediction in its first sheet")
        table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        return [{"question_id": row["index"], "text": str(row["prediction"] or "")} for row in table]

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        path = self.table(Path(data))
        rows, warnings = self._judged(path, answers)
        if fixed:
            rows = {key: row for key, row in rows.items() if row["answered"]}
        elif any("no answer" in warning for warning in warnings):
            warnings[-1] += "; they count as wrong. --fixed leaves them out"
        unresolved = sum(row["letter"] is None and row["answered"] for row in rows.values())
        if unresolved:
            warnings.append(
                f"{unresolved} answers name no option; exact matching counts them as wrong, the "
                "server would ask a judge"
            )
        groups = _circular(rows)
        first = [(row, groups[key]) for key, row in rows.items() if key in groups and key < ROTATION]
        report = {"Overall": mean(value for _, value in first)}
        report |= dict(
            sorted(
                group_means(
                    (
                        (_ABBREVIATIONS.get(row["l2-category"], row["l2-category"]), value)
                        for row, value in first
                        if row["l2-category"]
                    ),
                    1.0,
                ).items()
            )
        )
        report |= dict(
            sorted(
                group_means(
                    ((row["category"], value) for row, value in first if row["category"]), 1.0
                ).items()
            )
        )
        details = {
            "rule": "circular, exact matching",
            "rows": len(rows),
            "questions": len(first),
            "vanilla": 100 * mean(row["right"] for key, row in rows.items() if key < ROTATION),
            "vanilla_all_rows": 100 * mean(row["right"] for row in rows.values()),
            "unresolved": unresolved,
            "report": report,
        }
        return Score(self.name, 100 * report["Overall"] if first else None, details, warnings)

    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """1 where every answered rotation of a question is right."""
        rows, _ = self._judged(self.table(Path(data)), answers)
        rows = {key: row for key, row in rows.items() if row["answered"]}
        return [QuestionScore(str(key), str(key), value) for key, value in _circular(rows).items()]

    def constants(self, data: Path) -> list[str]:
        """The letters; with rotations none of them gets anything."""
        return list(OPTIONS)

    def letters(self, data: Path, answers: list[dict[str, Any]]) -> dict[int, str | None]:
        """The letter inferred from every answer, by index."""
        rows, _ = self._judged(self.table(Path(data)), answers)
        return {key: row["letter"] for key, row in rows.items() if row["answered"]}

    def _judged(self, path: Path, answers: list[dict]) -> tuple[dict[int, dict[str, Any]], list[str]]:
        """Every row of the file with the letter of its answer, and warnings."""
        problems: list[DataIssue] = []
        said = {row["question_id"]: str(row["text"]) for row in answers}
        rows = {}
        for _, _, row in rows_of(path, problems):
            key = int(row["index"])
            choices = {letter: row[letter] for letter in OPTIONS if row.get(letter, "") not in MISSING_CELLS}
            letter = infer_letter(said[key], choices) if key in said else None
            rows[key] = {
                "letter": letter,
                "right": float(letter == row["answer"]),
                "answered": key in said,
                "category": row.get("category", ""),
                "l2-category": row.get("l2-category", ""),
            }
        warnings = [str(problem) for problem in problems]
        return rows, warnings + check_known(self.title, [row["question_id"] for row in answers], rows, path)

    def submission(
        self, data: Path | None, answers: list[dict[str, Any]], questions: Path | None = None
    ) -> Submission:
        """The xlsx of the server: the table without pictures, with a column of predictions."""
        from openpyxl import Workbook

        if questions is None and data is None:
            raise DataError("give --data, or with --questions the benchmark's TSV")
        path, warnings = questions or self.table(Path(data)), []
        problems: list[DataIssue] = []
        said = {row["question_id"]: row["text"] for row in answers}
        book = Workbook()
        sheet, columns, known = book.active, [], []
        sheet.title = "Sheet1"
        for _, _, row in rows_of(path, problems):
            if not columns:
                columns = [name for name in row if name not in _NOT_UPLOADED]
                sheet.append([*columns[:6], "prediction", *columns[6:]])
            key = int(row["index"])
            known.append(key)
            cells = [key if name == "index" else _cell(row[name]) for name in columns]
            sheet.append([*cells[:6], _ILLEGAL.sub("", said[key]) if key in said else None, *cells[6:]])
        warnings += [str(problem) for problem in problems]
        warnings += check_known(self.title, [row["question_id"] for row in answers], known, path)
        content = BytesIO()
        book.save(content)
        return Submission({f"{self.name}_submission.xlsx": content.getvalue()}, len(known), SERVER, warnings)


class MMBenchCN(MMBench):
    """The Chinese one."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    folder = "mmbench_cn"
    other_folders = ("mmbench",)
    marker = "mmbench_dev_cn_20231003.tsv"
    sizes = {4329: "dev 20231003"}
    others = "mmbench_dev_cn*.tsv"
    files = (
        DataFile(
            marker,
            "questions, pictures and answers",
            "MMBench-CN dev, release 20231003 (github.com/open-compass/MMBench)",
            also=(others,),
        ),
    )
    instruction = "\n请直接回答选项字母。"


def _circular(rows: dict[int, dict[str, Any]]) -> dict[int, float]:
    """{index of the question: 1.0 if every rotation is right}."""
    groups: dict[int, float] = {}
    for key, row in rows.items():
        base = key % ROTATION
        groups[base] = min(groups.get(base, 1.0), row["right"])
    return groups


def _options(row: dict[str, str]) -> dict[str, str]:
    """Options up to the first that is missing."""
    found = {}
    for letter in OPTIONS:
        if is_missing(row.get(letter, "")):
            break
        found[letter] = row[letter]
    return found


def _cell(text: str) -> str | None:
    return None if text in MISSING_CELLS else _ILLEGAL.sub("", text)

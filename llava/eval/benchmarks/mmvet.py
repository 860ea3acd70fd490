"""MM-Vet: open questions that need several capabilities, graded from 0 to 1 by a language model.

Score: 100 x the mean grade, averaged over the runs of the judge. Grades are stored in MM-Vet's own format,
{id: {"model", "content", "score": [one per run]}}, to which we add "judge" and "prompt". Pass the file as the
answers, or keep it next to them under MM-Vet's name, `<answers>_<judge>-grade-<N>runs.json`, which `python -m
llava.eval.judge --benchmark mmvet` writes.

The instruction to the judge keeps MM-Vet's layout (header, seven graded examples, one line to complete) in
our own words. Scores comparable with published ones need `--prompt FILE` with the text in the benchmark's
repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import DataFile, Score, Submission, to_json
from llava.eval.benchmarks.files import Row, read_answers, read_json
from llava.eval.benchmarks.judging import UNKNOWN, GradeStep, Judge, JudgedBenchmark

QUESTIONS, TRUTH = "llava-mm-vet.jsonl", "mm-vet.json"
_GRADES = re.compile(r"^(?P<stem>.*)_(?P<judge>[^_]+)-grade-(?P<runs>\d+)runs?\.json$")
_PAGE = "MM-Vet, mm-vet.zip (github.com/yuweihao/MM-Vet)"
_TRIES = 5
_AGAIN = "\nPredict the correctness of the answer (digit): "

PROMPT = """\
Grade how correct the prediction of an AI model is, given the ground truth. Parts of the ground truth that \
are joined by <AND> must all be in the prediction for it to be fully right; of parts joined by <OR> any \
one is enough. The correctness is one of 0.0 (entirely wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 \
and 1.0 (entirely right). Complete the last cell of the table and write nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which two numbers solve the equation? | 2 <AND> -7 | The solution is 4. | 0.0
Which two numbers solve the equation? | 2 <AND> -7 | It is 2. | 0.5
Which two numbers solve the equation? | 2 <AND> -7 | The solutions are -7 and 3. | 0.5
Which two numbers solve the equation? | 2 <AND> -7 | x = -7 or x = 2 | 1.0
What is the share of red cars? | 1/4 <OR> 25% | A quarter of the cars are red, that is 25%. | 1.0
Why is this sign funny? | It forbids reading the sign, which one only learns by reading it, so that \
nobody can obey it. | The sign says something about reading. | 0.2
Why is this sign funny? | It forbids reading the sign, which one only learns by reading it, so that \
nobody can obey it. | One has to read it to learn that it must not be read; obeying it is impossible. | 1.0
"""


def parse_grade(reply: str) -> float | None:
    """Return the first word of a reply as a number from 0 to 1, else None."""
    try:
        value = float(reply.split(" ")[0])
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


class MMVet(JudgedBenchmark):
    name = "mmvet"
    title = "MM-Vet"
    folder = "mm-vet"
    other_folders = ("mmvet",)
    max_new_tokens = 1024
    marker = QUESTIONS
    markers = (TRUTH,)
    image_folder = "images"
    sizes = {218: "full release"}
    files = (
        DataFile(QUESTIONS, "questions"),
        DataFile("images", "images", _PAGE),
        DataFile(TRUTH, "ground truth for the judge", _PAGE, "score"),
    )
    truth_files = (TRUTH,)
    judge_model = "gpt-4-0613"

    @staticmethod
    def read_truth(path: Path) -> dict[str, Row]:
        return read_json(path, dict)

    def key(self, row: Row) -> str:
        return row["id"] if "id" in row else f"v1_{row['question_id']}"

    def image_of(self, key: Hashable, entry: Row) -> str:
        return entry["imagename"]

    def credit(self, entry: Row, row: Row) -> float | None:
        return float(np.mean(row["grades"])) if row.get("grades") else None

    def read_ungraded(self, path: Path) -> list[Row]:
        """Return answers of LLaVA's jsonl or MM-Vet's results ({id: text}), or only the ids of grades."""
        if path.suffix != ".json":
            return read_answers(path)
        document = read_json(path, dict)
        if _are_grades(document):
            return [{"id": key} for key in document]
        return [
            {"id": key, "question_id": key.removeprefix("v1_"), "text": str(text)}
            for key, text in document.items()
        ]

    def stored_grades(self, path: Path) -> list[Path]:
        """Return the grades with most runs, then those of other judges; or the path itself for grades."""
        if path.suffix == ".json" and _are_grades(read_json(path, dict)):
            return [path]
        stems = {path.stem, path.stem.removeprefix("llava_answers_"), path.stem.removeprefix("results_")}
        found = [
            (int(match["runs"]), one.name, one)
            for one in path.parent.glob("*.json")
            if (match := _GRADES.match(one.name)) and match["stem"] in stems
        ]
        *others, used = [one for _, _, one in sorted(found)] or [None]
        others = [one for one in others if _named_judge(one) != _named_judge(used)]
        return [used, *others] if used else []

    def with_grades(self, rows: list[Row], path: Path) -> list[Row]:
        grades = read_json(path, dict)
        return [
            {
                **row,
                "grades": entry.get("score", []),
                "grades_file": path.name,
                "judge": entry.get("judge") or next(iter(entry.get("model", [])), None),
            }
            for row in rows
            for entry in [grades.get(self.key(row), {})]
        ]

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        rows, warnings, _ = self.join(data, answers)
        graded = {key: row["grades"] for key, row in rows.items() if row.get("grades")}
        details: dict[str, Any] = {"answered": len(rows), "graded": len(graded)}
        if not graded:
            warnings.append(
                "not graded yet: run python -m llava.eval.judge --benchmark mmvet --data ... --answers ..., "
                "or submit the file that python -m llava.eval.submit writes"
            )
            return Score(self.name, None, details, warnings)
        judge, notes = self.judged_by(list(rows.values()))
        warnings += notes
        runs = {len(grades) for grades in graded.values()}
        if len(runs) > 1 or len(graded) < len(rows):
            warnings.append(
                f"grading is not finished: {len(rows) - len(graded)} answers have no grade, the others "
                f"{min(runs)} to {max(runs)}. Run the judge again to resume"
            )
            if not fixed:
                return Score(self.name, None, details, warnings)
        table = [grades[: min(runs)] for grades in graded.values()]  # (answers, runs)
        truth = self.truth(data)
        needs = [truth[key]["capability"] for key in graded]
        groups = ["_".join(sorted(one)) for one in needs]
        per_run = _run_means(table)
        details |= {
            "total": round(float(np.mean(per_run)), 1),
            "std": round(float(np.std(per_run)), 1),
            "runs": [round(one, 1) for one in per_run],
            "capability": {
                name: _total(table, [name in one for one in needs])
                for name in dict.fromkeys(name for one in needs for name in one)
            },
            "integration": {
                name: _total(table, [name == one for one in groups]) for name in dict.fromkeys(groups)
            },
            "judge": judge,
            "grades": next(row["grades_file"] for row in rows.values() if row.get("grades")),
        }
        return Score(self.name, details["total"], details, warnings)

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return {"v1_<question_id>": text}, MM-Vet's result file."""
        document = {self.key(row): row["text"] for row in answers}
        files = {"mmvet_submission.json": to_json(document, indent=2)}
        return Submission(files, len(document), "MM-Vet's online evaluator (linked from its repository)")

    # -- judging ----------------------------------------------------------------------------------

    def grades_path(self, answers: Path, model: str, runs: int) -> Path:
        return answers.with_name(f"{answers.stem}_{_slug(model)}-grade-{runs}runs.json")

    def grade(
        self, data: Path, answers: list[Row], judge: Judge, output: Path, runs: int = 1, adopt: bool = False
    ) -> Iterator[GradeStep]:
        truth, rows = self.truth(data), self.join(data, answers).rows
        grades = read_json(output, dict) if output.is_file() else {}
        self.check_judge(output, (_record(entry, output, judge) for entry in grades.values()), judge, adopt)
        for key, row in rows.items():
            entry = grades.setdefault(key, {"model": [], "content": [], "score": []})
            yield GradeStep(key, output, None)
            while len(entry["score"]) < runs:
                answer = truth[key]["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
                cells = " | ".join([truth[key]["question"], answer, row["text"], ""])
                reply, model, value = self._ask(judge, (judge.prompt or PROMPT) + cells)
                for name, part in (("model", model), ("content", reply), ("score", value)):
                    entry[name].append(part)
                entry |= judge.record()
                yield GradeStep(key, output, json.dumps(grades, indent=1))

    @staticmethod
    def _ask(judge: Judge, question: str) -> tuple[str, str, float]:
        """Return (reply, model, grade); retry with a higher temperature without a number, finally grade 0."""
        reply = model = ""
        for attempt in range(_TRIES):
            text = question if attempt == 0 else question + _AGAIN
            reply, model = judge.ask([{"role": "user", "content": text}], 0.5 * attempt, 3)
            value = parse_grade(reply)
            if value is not None:
                return reply, model, value
        return reply, model, 0.0


def _are_grades(document: Row) -> bool:
    return all(isinstance(value, dict) and "score" in value for value in document.values())


def _slug(model: str) -> str:
    return model.replace("/", "-").replace("_", "-")


def _named_judge(path: Path) -> str | None:
    match = _GRADES.match(path.name)
    return match and match["judge"]


def _record(entry: Row, path: Path, judge: Judge) -> dict[str, str]:
    """Return the judge of stored grades; without a record, by file name, else the model that replied."""
    if "judge" in entry:
        return entry
    if not entry["score"]:
        return judge.record()
    given = _named_judge(path) or next(iter(entry["model"]), UNKNOWN)
    return {"judge": judge.model if _slug(judge.model) == _slug(given) else given, "prompt": "built-in"}


def _run_means(table: list[list[float]]) -> list[float]:
    """Return 100 x the mean grade of every run, summed in order as by MM-Vet: the last bit rounds x.x5."""
    return [100 * (sum(grades) / len(table)) for grades in zip(*table, strict=True)]


def _total(table: list[list[float]], chosen: list[bool]) -> float:
    """Return 100 x the mean grade of the chosen answers over all runs, 1 decimal."""
    rows = [row for row, inside in zip(table, chosen, strict=True) if inside]
    return round(float(np.mean(_run_means(rows))), 1)

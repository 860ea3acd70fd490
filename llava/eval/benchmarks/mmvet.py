"""MM-Vet: open questions that need several capabilities at once, graded from 0 to 1 by a language model.

Files: `llava-mm-vet.jsonl`, `images/`, `mm-vet.json` (ground truth). The number is 100 x the mean grade,
averaged over the runs of the judge. Grades come from a stored file, MM-Vet's own format {id: {"model",
"content", "score": [one per run]}}: give it as the answers, or let it stand beside the answers under
MM-Vet's name, `<answers>_<judge>-grade-<N>runs.json`. `python -m llava.eval.judge --benchmark mmvet` makes
one through any OpenAI-compatible endpoint and goes on where it was stopped.

The instruction to the judge keeps MM-Vet's layout (header, seven graded examples, one line to complete) in
our own words; `--prompt FILE` replaces it by another text, such as the one in the benchmark's repository,
which numbers to be compared with published ones need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import (
    DataError,
    DataFile,
    DataIssue,
    Question,
    QuestionScore,
    Score,
    Submission,
    read_answers,
    read_questions,
)
from llava.eval.benchmarks.common import (
    LLAVA_EVAL_ZIP,
    MeanBenchmark,
    check_known,
    check_pairing,
    read_json,
    require,
    to_json,
)

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
    """The first word of a reply as a number from 0 to 1, else None."""
    try:
        value = float(reply.split(" ")[0])
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


class MMVet(MeanBenchmark):
    name = "mmvet"
    title = "MM-Vet"
    folder = "mm-vet"
    other_folders = ("mmvet",)
    marker = QUESTIONS
    markers = (TRUTH,)
    metric = "score"
    max_new_tokens = 1024
    sizes = {218: "full release"}
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL_ZIP),
        DataFile("images", "pictures", _PAGE),
        DataFile(TRUTH, "ground truth, for the judge", _PAGE, "score"),
    )

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where the question file is missing."""
        path = require(data, QUESTIONS, f"LLaVA's question file, from {LLAVA_EVAL_ZIP},")
        return read_questions(path, data / "images", problems)

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        try:
            truth = self._truth(data)
        except DataError as error:
            return [f"cannot be graded: {error}"]
        return check_pairing(questions, [f"v1_{one.question_id}" for one in questions], truth, data / TRUTH)

    def read_answers(self, path: str | Path) -> list[dict[str, Any]]:
        """LLaVA's jsonl, MM-Vet's results ({id: text}) or grades; stored grades beside them are joined."""
        path = Path(path)
        if path.suffix != ".json":
            rows = read_answers(path)
            for row in rows:
                row["id"] = f"v1_{row['question_id']}"
        else:
            document = read_json(path, dict)
            if all(isinstance(value, dict) and "score" in value for value in document.values()):
                return self._with_grades([{"id": key} for key in document], path)
            rows = [
                {"id": key, "question_id": key.removeprefix("v1_"), "text": str(text)}
                for key, text in document.items()
            ]
        stored = self.stored_grades(path)
        return self._with_grades(rows, stored[-1]) if stored else rows

    @staticmethod
    def stored_grades(path: Path) -> list[Path]:
        """Grade files beside an answer file, the one of most runs last."""
        stems = {path.stem, path.stem.removeprefix("llava_answers_"), path.stem.removeprefix("results_")}
        found = [
            (int(match["runs"]), one.name, one)
            for one in path.parent.glob("*.json")
            if (match := _GRADES.match(one.name)) and match["stem"] in stems
        ]
        return [one for _, _, one in sorted(found)]

    @staticmethod
    def _with_grades(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
        grades = read_json(path, dict)
        return [
            {
                **row,
                "grades": grades.get(row["id"], {}).get("score", []),
                "grades_file": path.name,
                "judge": next(iter(grades.get(row["id"], {}).get("model", [])), None),
            }
            for row in rows
        ]

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        data = Path(data)
        truth = self._truth(data)
        answers = self._identified(answers)
        warnings = check_known(self.title, [row["id"] for row in answers], truth, data / TRUTH)
        graded = {row["id"]: row["grades"] for row in answers if row.get("grades")}
        details: dict[str, Any] = {"answered": len({row["id"] for row in answers}), "graded": len(graded)}
        if not graded:
            warnings.append(
                "not graded yet: python -m llava.eval.judge --benchmark mmvet --data ... "
                "--answers ... asks a judge; or hand in what python -m llava.eval.submit writes"
            )
            return Score(self.name, None, details, warnings)
        runs = {len(grades) for grades in graded.values()}
        if len(runs) > 1 or len(graded) < details["answered"]:
            warnings.append(
                f"grading is not finished: {details['answered'] - len(graded)} answers have no "
                f"grade, the others {min(runs)} to {max(runs)}; start the judge again to go on"
            )
            if not fixed:
                return Score(self.name, None, details, warnings)
        count = min(runs)
        table = np.array([graded[key][:count] for key in graded])  # (answers, runs)
        needs = [sorted(truth[key]["capability"]) for key in graded]
        capability = {
            name: _mean(table, [name in one for one in needs])
            for name in dict.fromkeys(name for key in graded for name in truth[key]["capability"])
        }
        integration = {
            name: _mean(table, ["_".join(one) == name for one in needs])
            for name in dict.fromkeys("_".join(one) for one in needs)
        }
        per_run = np.array([100 * (sum(grades) / len(graded)) for grades in table.T.tolist()])
        judges = {row["judge"] for row in answers if row.get("judge")}
        details |= {
            "total": round(float(per_run.mean()), 1),
            "std": round(float(per_run.std()), 1),
            "runs": [round(float(one), 1) for one in per_run],
            "capability": capability,
            "integration": integration,
            "judge": ", ".join(sorted(judges)) or None,
            "grades": answers[0].get("grades_file"),
        }
        return Score(self.name, details["total"], details, warnings)

    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """The mean grade of every graded answer."""
        truth = self._truth(Path(data))
        rows = {row["id"]: row for row in self._identified(answers) if row.get("grades")}
        return [
            QuestionScore(key, row["imagename"], float(np.mean(rows[key]["grades"])))
            for key, row in truth.items()
            if key in rows
        ]

    def submission(
        self, data: Path | None, answers: list[dict[str, Any]], questions: Path | None = None
    ) -> Submission:
        """{"v1_<question_id>": text}, MM-Vet's result file."""
        document = {row["id"]: row["text"] for row in self._identified(answers)}
        return Submission(
            {"mmvet_submission.json": to_json(document, indent=2)},
            len(document),
            "MM-Vet's online evaluator (linked from its repository)",
        )

    def grade(
        self,
        data: Path,
        answers: list[dict[str, Any]],
        ask: Callable[..., tuple[str, str]],
        output: Path,
        runs: int = 1,
        prompt: str | None = None,
    ) -> Iterator[str]:
        """Fill in the grade file `output`; yields each id done, after it is on the disk.

        ask(messages, temperature, max_tokens) -> (reply, model). Grades that are there already are kept.
        """
        from llava.eval.store.atomic import write_atomically

        truth = self._truth(Path(data))
        rows = self._identified(answers)
        check_known(self.title, [row["id"] for row in rows], truth, Path(data) / TRUTH)
        grades = read_json(output, dict) if output.is_file() else {}
        for row in rows:
            entry = grades.setdefault(row["id"], {"model": [], "content": [], "score": []})
            while len(entry["score"]) < runs:
                one = truth[row["id"]]
                answer = one["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
                cells = " | ".join([one["question"], answer, row["text"], ""])
                reply, model, value = self._ask(ask, (prompt or PROMPT) + cells)
                for key, part in (("model", model), ("content", reply), ("score", value)):
                    entry[key].append(part)
                write_atomically(output, json.dumps(grades, indent=1))
            yield row["id"]

    @staticmethod
    def _ask(ask: Callable[..., tuple[str, str]], question: str) -> tuple[str, str, float]:
        """(reply, model, grade): asked again with more temperature where no number comes, 0 in the end."""
        reply = model = ""
        for attempt in range(_TRIES):
            text = question if attempt == 0 else question + _AGAIN
            reply, model = ask([{"role": "user", "content": text}], 0.5 * attempt, 3)
            value = parse_grade(reply)
            if value is not None:
                return reply, model, value
        return reply, model, 0.0

    @staticmethod
    def _identified(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row if "id" in row else {**row, "id": f"v1_{row['question_id']}"} for row in answers]

    @staticmethod
    def _truth(data: Path) -> dict[str, dict[str, Any]]:
        return read_json(require(data, TRUTH, "MM-Vet's ground truth"), dict)


def _mean(table: np.ndarray, chosen: list[bool]) -> float:
    """100 x the mean grade of the chosen answers over all runs, 1 decimal.

    Summed one by one, as MM-Vet does: x.x5 is common, and rounds by the last bit.
    """
    rows = [row for row, inside in zip(table.tolist(), chosen, strict=True) if inside]
    per_run = [100 * (sum(grades) / len(rows)) for grades in zip(*rows, strict=True)]
    return round(float(np.mean(per_run)), 1)

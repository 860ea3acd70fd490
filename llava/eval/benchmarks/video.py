"""Zero-shot video questions (TGIF-QA, MSVD-QA, MSRVTT-QA, ActivityNet-QA), judged by a language model.

A question is about one video, NAME with the first of the extensions .mp4, .avi, .mov, .mkv that exists. The
files with 1,000 questions are used where they are present, else the full ones; questions and answers are
joined by question_id.

Score: the judge's accuracy, yes / (yes + no); `average_score` is from 0 to 5. Replies are stored in a file
({id: [reply, {"q", "a", "pred"}]}) or a folder (<id>.json each), plus "judge" and "prompt" in the second part
(else the judge is unknown). Pass them as the answers, or keep them next to the answers as `<answers>_judged`,
`<answers>_judge_replies.json` or `judge_replies.json`. Official rules: scores are truncated to integers, a
score that is not an integer's text counts 0, "maybe" is neither yes nor no. The offline matches in the
details need no judge: lower bounds, *not* comparable with papers.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import DataFile, PerImageCounts, Score, mean
from llava.eval.benchmarks.files import ANSWER, DataIssue, Question, Row, read_json, read_rows
from llava.eval.benchmarks.judging import TRIES, UNKNOWN, Judge, JudgedBenchmark
from llava.eval.benchmarks.normalize import vqa_official
from llava.eval.benchmarks.questions import make_question
from llava.eval.benchmarks.shapes import ID, TEXT, Shape, mismatch
from llava.video_files import read_frames

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv")
QUESTION: Shape = {"video_name": str, "question_id": ID, "question": str}
# Lines of Video-LLaVA's merge.jsonl; an answer file has LLaVA's keys instead.
PREDICTION: Shape = {"id": ID, "pred": str, "question?": str, "answer?": TEXT}
REPLIES = "judge_replies.json"
_PAGE = "Video-ChatGPT's zero-shot sets, as collected for Video-LLaVA's evaluation"

SYSTEM = (
    "You are an intelligent chatbot that judges answers to questions about videos. Compare the predicted "
    "answer with the correct answer and decide whether they match in meaning; synonyms and paraphrases are "
    "valid."
)
PROMPT = """\
Judge this answer to a question about a video.

Question: {question}
Correct Answer: {answer}
Predicted Answer: {prediction}

Say yes or no, and give a score, an integer between 0 and 5 where 5 is the best match. Reply with a Python \
dictionary string with the keys 'pred' ('yes' or 'no') and 'score' and with nothing else, for example \
{'pred': 'yes', 'score': 4}."""


def tally(replies: list[Row]) -> Row:
    """Return the official counts over judge replies ({"pred", "score"}, either may be missing or invalid)."""
    yes = no = total = 0
    for reply in replies:
        try:
            total += float(int(reply["score"]))
            said = reply["pred"].lower()
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            continue
        yes += "yes" in said
        no += "yes" not in said and "no" in said
    return {
        "yes_count": yes,
        "no_count": no,
        "accuracy": yes / (yes + no) if yes + no else None,
        "average_score": total / len(replies) if replies else None,
    }


def parse_reply(text: str) -> Row | None:
    """Return the Python dictionary that a judge wrote, or None."""
    try:
        reply = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


def exact_match(answer: str, correct: str) -> bool:
    """Return whether an answer is the correct one but for spaces around it."""
    return answer.strip() == correct.strip()


class VideoQA(JudgedBenchmark):
    """One of the sets; they differ in names: of the set, its folder, the videos' folder, and their prefix."""

    media = "video"
    metric = "accuracy"
    max_new_tokens = 1024
    sizes = {1000: "first 1,000"}
    marker = "test_q_1k.json"
    markers = ("test_q.json",)
    judge_model = "gpt-3.5-turbo"
    placeholders = ("{question}", "{answer}", "{prediction}")
    grades_name = "{answers}_judged"
    scores_parts = True
    without_judge = "; the offline matches are not comparable with papers"

    def __init__(self, name: str, title: str, folder: str, videos: str, prefix: str = "") -> None:
        self.name, self.title, self.videos, self.prefix = name, title, videos, prefix
        self.folder, self.other_folders = f"GPT_Zero_Shot_QA/{folder}", (folder, f"video/{folder}")
        self.files = (
            DataFile("test_q_1k.json", "questions", _PAGE, also=("test_q.json",)),
            DataFile("test_a_1k.json", "answers", _PAGE, "score", ("test_a.json",)),
            DataFile(videos, "videos", f"{title}'s own release"),
        )

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        path, folder, index = self.find(data, self.marker), data / self.videos, 0
        for number, row in enumerate(read_json(path, list, QUESTION), 1):
            names = [f"{self.prefix}{row['video_name']}{extension}" for extension in EXTENSIONS]
            name = next((one for one in names if os.path.isfile(folder / one)), names[0])
            values = row["question_id"], name, row["question"], folder, self.allow_outside
            try:
                yield make_question(index, *values, file=str(path), line=number)
            except ValueError as error:
                problems.append(DataIssue(str(path), number, str(error)))
                continue
            index += 1

    def load_image(self, image: Any) -> Any:
        """Return the frames of a video as PIL images. Raises OSError or ValueError naming the file."""
        return read_frames(image)

    @staticmethod
    def read_truth(answers: Path, questions: Path) -> dict[Hashable, Row]:
        """Return {question_id: correct answer, question and video}."""
        asked = {row["question_id"]: row for row in read_json(questions, list, QUESTION)}
        rows = read_json(answers, list, {"question_id": ID, "answer": ID})
        return {row["question_id"]: {**row, **asked.get(row["question_id"], {})} for row in rows}

    def truth_paths(self, data: Path) -> list[Path]:
        """Return the answer file that belongs to the question file in use, and that one."""
        questions = self.find(data, self.marker)
        return [self.find(data, questions.name.replace("test_q", "test_a")), questions]

    def image_of(self, key: Hashable, entry: Row) -> str:
        return f"{self.prefix}{entry.get('video_name')}"

    def credit(self, entry: Row, row: Row) -> float | None:
        """Return 1 for the judge's yes, 0 for its no; other replies are left out."""
        return tally(row["grades"])["accuracy"] if "grades" in row else None

    def rate(self, truth: Mapping[Hashable, Row], graded: dict[Hashable, Row], score: Score) -> None:
        counts = tally([row["grades"][0] for row in graded.values()])
        score.details |= counts
        score.score = None if counts["accuracy"] is None else 100 * counts["accuracy"]
        invalid = len(graded) - counts["yes_count"] - counts["no_count"]
        if invalid:
            score.warnings.append(
                f"{invalid} replies are neither yes nor no, or have no integer score; the official tally "
                "leaves them out of the accuracy"
            )

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        """Add what needs no judge: the offline matches, and answers stored with another ground truth."""
        score = super().official_score(data, answers, fixed)
        rows = self.join(data, answers).rows
        right = {key: self.truth(data)[key]["answer"] for key in rows}
        pairs = [(row["text"], str(right[key])) for key, row in rows.items()]
        score.details |= {
            "judged": score.details.pop("graded"),
            "offline_exact_match": 100 * mean(exact_match(*pair) for pair in pairs),
            "offline_normalised_match": 100 * mean(vqa_official(a) == vqa_official(b) for a, b in pairs),
        }
        wrong = [key for key, row in rows.items() if row.get("truth") not in (None, right[key])]
        if wrong:
            score.warnings.append(
                f"{len(wrong)} of {len(rows)} answers are stored with another correct answer than the ground "
                f"truth has (first: {wrong[0]}). Programs that split only the questions into chunks cause "
                "this; the judge's replies to these answers are not valid"
            )
        return score

    def offline_counts(self, data: Path, answers: Sequence[Row]) -> PerImageCounts:
        """Return the exact matches per video, for intervals of `offline_exact_match` by `score_counts`."""
        table: dict[str, list[float]] = {}
        for key, entry, row in self.matched(data, answers):
            counts = table.setdefault(self.image_of(key, entry), [0.0, 0.0])
            counts[0] += exact_match(row["text"], str(entry["answer"]))
            counts[1] += 1
        return PerImageCounts(tuple(table), np.array(list(table.values())))

    def asked_texts(self, data: Path) -> Mapping[Hashable, Sequence[str]]:
        return {key: (entry["question"],) for key, entry in self.truth(data).items() if "question" in entry}

    def read_ungraded(
        self, path: Path, problems: list[DataIssue] | None = None
    ) -> tuple[list[Row], list[Path]]:
        """Read merge.jsonl ({"id", "question", "answer", "pred"}), LLaVA's jsonl, or answers in replies."""
        if path.is_dir() or path.suffix == ".json":
            rows = [
                {"question_id": key, "text": asked.get("pred", ""), "truth": asked.get("a")}
                for key, (_, asked) in self.read_grades(path).items()
            ]
            return rows, [path]
        rows = read_rows(path, (PREDICTION, ANSWER), "Fix or delete such lines before scoring", problems)
        for place, row in enumerate(rows):
            if {"id", "pred"} <= row.keys():
                rows[place] = {"question_id": row["id"], "text": row["pred"], "truth": row.get("answer")}
                if "question" in row:
                    rows[place]["prompt"] = row["question"]
        names = (f"{path.stem}_judged", f"{path.stem}_{REPLIES}", REPLIES)
        return rows, [path.with_name(name) for name in names if path.with_name(name).exists()]

    def entry_mismatch(self, entry: Any) -> str | None:
        if not isinstance(entry, list) or len(entry) != 2:
            return "expected [{'pred', 'score'}, {'q', 'a', 'pred'}]"
        texts = {"pred?": str, "a?": TEXT, "judge?": str, "prompt?": str}
        found = mismatch(entry[1], texts)
        return found and found.lstrip(".: ")

    def grades_of(self, entry: list[Row]) -> Row:
        return {"grades": entry[:1], "judge": entry[1].get("judge", UNKNOWN)}

    def record_of(self, entry: list[Row], path: Path, judge: Judge) -> Row:
        return entry[1]

    def ask(self, judge: Judge, truth: Row, row: Row, entry: list[Row] | None) -> list[Row] | None:
        asked = {
            "q": truth.get("question", row.get("prompt", "")),
            "a": str(truth["answer"]),
            "pred": row["text"],
        }
        values = dict(zip(self.placeholders, asked.values(), strict=True))
        names = "|".join(map(re.escape, values))
        text = re.sub(names, lambda match: values[match[0]], judge.prompt or PROMPT)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        replies = (parse_reply(judge.ask(messages, None, None)[0]) for _ in range(TRIES))
        reply = next((one for one in replies if one is not None), None)
        return None if reply is None else [reply, {**asked, **judge.record()}]


TGIF = partial(VideoQA, "tgif", "TGIF-QA", "TGIF_Zero_Shot_QA", "mp4")
MSVD = partial(VideoQA, "msvd", "MSVD-QA", "MSVD_Zero_Shot_QA", "videos")
MSRVTT = partial(VideoQA, "msrvtt", "MSRVTT-QA", "MSRVTT_Zero_Shot_QA", "videos/all")
ActivityNet = partial(
    VideoQA, "activitynet", "ActivityNet-QA", "Activitynet_Zero_Shot_QA", "all_test", prefix="v_"
)

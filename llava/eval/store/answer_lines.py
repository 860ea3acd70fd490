"""One line of an answer file: how it is written, and whether an existing line belongs to this run.

A line is identified by `metadata.index`, the position of its question in the question file, because question
ids are not unique.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import shortuuid

from llava.eval.benchmarks import Answer, Question
from llava.eval.store.provenance import Configuration, differences

_HEAD = b'{"question_id"'  # every line begins with this


class AnswerFileError(RuntimeError):
    """The answer file cannot be used or written; the message says why and what to do."""


class ForeignAnswerError(AnswerFileError):
    """A line of the right configuration that answers a question which is not asked."""


class AnswerLines:
    """Writes and recognizes the answer lines of one configuration to these questions."""

    def __init__(self, questions: Sequence[Question], configuration: Configuration) -> None:
        self.questions: Mapping[int, Question] = {question.index: question for question in questions}
        self._configuration = configuration
        self._metadata = configuration.metadata()

    def write(self, answer: Answer, retried: bool = False) -> bytes:
        """Return the line of an answer, with its newline; `retried` if an earlier start failed to answer."""
        question = self.questions[answer.index]
        own = {"index": answer.index, "visual_tokens": answer.visual_tokens}
        own |= {"retried": True} if retried else {}
        record = {
            "question_id": question.question_id,
            "prompt": asked_prompt(question),
            "text": answer.text,
            "answer_id": shortuuid.uuid(),
            "model_id": self._configuration.model,
            **{key: value for key, value in question.extra.items() if key != "prompt"},
            "metadata": {**own, **self._metadata},
        }
        return (json.dumps(record) + "\n").encode()

    def note(self, notes: Sequence[str]) -> None:
        """Record in the metadata of new lines how the loaded model departs from its checkpoint's files."""
        self._metadata["notes"] = list(notes)

    def read(self, raw: bytes, where: str) -> int | None:
        """Return the index of the question that a line answers; None for an incomplete line.

        Args:
            where: "file:line" for messages.

        Raises:
            AnswerFileError: The line is not ours, or of another configuration.
            ForeignAnswerError: It answers another question.
        """
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            if raw.startswith(_HEAD[: len(raw)]) or not raw.strip(b"\0\n"):  # zeros: a power cut
                return None
            record = None
        if not isinstance(record, dict) or not {"question_id", "prompt", "text"} <= record.keys():
            raise AnswerFileError(
                f"{where}: not an answer of this program. Use a new --output or --answers-file"
            )
        metadata = record.get("metadata")
        if not isinstance(metadata, dict) or "config" not in metadata or "index" not in metadata:
            raise AnswerFileError(
                f"{where}: an answer that was not made by this program. Use a new --output or "
                "--answers-file, or move the file"
            )
        if metadata["config"] != self._metadata["config"]:
            found = "; ".join(differences(metadata, self._configuration)) or "an unknown field differs"
            raise AnswerFileError(
                f"{where}: cannot resume: {found}. Restore the options, use a new --output or "
                "--answers-file, or move the file"
            )
        index = metadata["index"]
        question = self.questions.get(index) if isinstance(index, int) else None
        if question is None:
            raise ForeignAnswerError(
                f"{where}: answers question number {index!r}, but {len(self.questions)} questions "
                "are known (another question file or chunk?). Use a new --output or --answers-file"
            )
        if (record["question_id"], record["prompt"]) != (question.question_id, asked_prompt(question)):
            raise ForeignAnswerError(
                f"{where}: the question of this answer is not question number {metadata['index']} of this "
                "question file. Use a new --output or --answers-file"
            )
        return question.index


def asked_prompt(question: Question) -> str:
    """Return the prompt that an answer line records for a question."""
    return question.extra.get("prompt", question.text)

"""Figure 1: what every method keeps of an image, and what it answers."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from llava.analysis.figures import drawing
from llava.analysis.figures.drawing import Table
from llava.analysis.kept_tokens import CropTokens, counts, encode, kept_tokens
from llava.analysis.overlay import DIVERSE, IMPORTANT, MERGED, count_text, panel
from llava.analysis.questions import read_question_file, reference_answers
from llava.eval import cli
from llava.eval.benchmarks import Answer, DataError, DataIssue, Question, get_benchmark
from llava.eval.inference.engine import PassSetting
from llava.eval.jobs.job import Task, read_task
from llava.eval.jobs.session import MethodUnavailable, Session
from llava.paths import BUNDLED_MODEL
from llava.pruning import Pruner, get_pruner

PHOTOS = BUNDLED_MODEL.with_name("photos") / "questions.json"
_COLUMNS, _COLUMNS_OF_CROPS = 8, 3
_WORDS = {None: "", True: "right", False: "wrong"}
_LEGEND = (
    ("important ([CLS] attention)", IMPORTANT, None),
    ("other kept patches", DIVERSE, None),
    ("merged into one token, in their mean color", MERGED, (200, 180, 170)),
    ("pruned", (225, 225, 225), (225, 225, 225)),
)
_COLORS = {None: "#444444", True: "#0072b2", False: "#d55e00"}


@dataclass(frozen=True)
class ShownAnswer:
    """A method on one question: the tokens that it keeps and its answer; `right` is None if not known."""

    pruner: Pruner
    tokens: Sequence[CropTokens]
    answer: str
    right: bool | None


@dataclass(frozen=True)
class Example:
    """A question about an image, with all methods; the first one keeps all tokens."""

    question: Question
    truth: str | None
    crops: Sequence[Image.Image]
    side: int  # patches along a side of a crop
    answers: Sequence[ShownAnswer]

    @property
    def differs(self) -> bool:
        """Whether the methods answer differently."""
        return len({_plain(one.answer) for one in self.answers}) > 1


@dataclass
class _Collected:
    """Answers of one setting, kept in memory."""

    answers: dict[int, str] = field(default_factory=dict)

    def wants(self, index: int) -> bool:
        return index not in self.answers

    def write(self, answers: Sequence[Answer]) -> None:
        self.answers |= {one.index: one.text for one in answers}

    def note(self, notes: Sequence[str]) -> None:
        """Ignore notes: the figure is not resumed."""


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def read_examples(args: argparse.Namespace) -> list[tuple[Task, dict[int, str]]]:
    """Return the questions about one image each, with the answers that a file gives, by `Question.index`.

    These are the first two images of --question-file, else the first one of POPE and the bundled photograph.

    Raises:
        DataError: There are no questions.
    """
    if args.question_file is not None:
        return _of_file(args.question_file, args.image_folder, args.limit, 2, args.allow_outside_images)
    task = read_task(get_benchmark("pope"), args.data, args.limit)
    first = [one for one in task.asked if one.image == task.asked[0].image]
    found = [(replace(task, questions=first), _labels(task, first))]
    return found + (_of_file(PHOTOS, PHOTOS.parent, None, 1) if PHOTOS.is_file() else [])


def _of_file(
    path: Path, folder: Path, limit: int | None, images: int, allow_outside: bool = False
) -> list[tuple[Task, dict[int, str]]]:
    issues: list[DataIssue] = []
    questions = read_question_file(path, folder, issues, allow_outside)
    truths, asked = reference_answers(path, questions), questions[:limit]
    shown = list(dict.fromkeys(one.image for one in asked))[:images]
    tasks = [Task([one for one in asked if one.image == image]) for image in shown]
    return [(replace(tasks[0], issues=issues), truths), *((task, truths) for task in tasks[1:])]


def _labels(task: Task, questions: Sequence[Question]) -> dict[int, str]:
    """Return POPE's labels; {} if they are not on this machine."""
    rows = [_row(one, "") for one in questions]
    try:
        matched = task.benchmark.matched(task.folder, rows)
    except DataError:
        return {}
    return {row["metadata"]["index"]: entry["label"].capitalize() for _, entry, row in matched}


def _row(question: Question, text: str) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": text,
        "metadata": {"index": question.index},
    }


def _is_right(task: Task, question: Question, text: str, truth: str | None) -> bool | None:
    """Judge an answer by the benchmark's rule, or as equal to the truth of a file; None without a truth."""
    if truth is None:
        return None
    if task.benchmark is None:
        return _plain(text) == _plain(truth)
    ((_, entry, row),) = task.benchmark.matched(task.folder, [_row(question, text)])
    return task.benchmark.credit(entry, row) == 1


def answer_all(
    session: Session, task: Task, pruners: Sequence[Pruner], reasons: dict[str, str]
) -> dict[Pruner, dict[int, str]]:
    """Answer all questions of a task with every method that the model can run.

    Args:
        reasons: Receives why it cannot run the others, by name.

    Returns:
        The answers by `Question.index`.

    Raises:
        DataError: A question has no answer.
    """
    engine = session.engine(task, batch_size=64)
    found = {}
    for pruner in pruners:
        setting = PassSetting(pruner.name, pruner, _Collected())
        try:
            session.check_method(pruner)
            stats = engine.run(task.asked, [setting], progress=False)
        except (MethodUnavailable, ValueError) as error:  # such as crops that it cannot select from
            reasons.setdefault(pruner.name, str(error))
            continue
        if stats.failures:
            raise DataError(str(stats.failures[0]))
        found[pruner] = setting.writer.answers
    return found


def example(
    session: Session,
    task: Task,
    truths: dict[int, str],
    pruners: Sequence[Pruner],
    reasons: dict[str, str],
) -> Example:
    """Ask all questions of a task and return the first one on which methods differ, else the first one.

    Args:
        task: Questions about one image.
        reasons: Receives why the model cannot run a method, by name; those are left out.

    Raises:
        DataError: A question has no answer.
        MethodUnavailable: The model can run none of the methods.
    """
    texts = answer_all(session, task, pruners, reasons)
    if not texts:
        raise MethodUnavailable(f"--methods: the model can run none of them. {next(iter(reasons.values()))}")
    differing = [one for one in task.asked if len({_plain(text[one.index]) for text in texts.values()}) > 1]
    question = (differing or task.asked)[0]
    engine = session.engine(task)
    crops, vision = encode(engine, engine.load_image(question.image), list(texts))
    truth, answers = truths.get(question.index), []
    for pruner, text in texts.items():
        tokens, answer = kept_tokens(engine, vision, pruner, question), text[question.index]
        answers.append(ShownAnswer(pruner, tokens, answer, _is_right(task, question, answer, truth)))
    side = engine.model.get_vision_tower().num_patches_per_side
    return Example(question, truth, crops, side, answers)


def draw(examples: Sequence[Example], caption: str, folder: Path) -> list[str]:
    """Draw and write the figure."""
    shown = max(len(one.answers) for one in examples)
    crops = max(len(one.crops) for one in examples)
    columns = min(shown, _COLUMNS if crops == 1 else _COLUMNS_OF_CROPS)
    rows = -(-shown // columns)
    each = 7.1 / columns / (1 if crops == 1 else crops) + (0.36 if crops == 1 else 0.33)  # inches of a row
    with drawing.new_figure(len(examples) * (rows * each + 0.33) + drawing.LEGEND, caption) as figure:
        parts = drawing.blocks_above_legend(figure, len(examples), _LEGEND)
        for part, one in zip(parts, examples, strict=True):
            part.suptitle(drawing.literal(heading(one)), x=0.012, ha="left", fontsize=8.5, fontweight="bold")
            panels = list(part.subplots(rows, columns, squeeze=False).flat)
            for axes in panels:
                axes.set_axis_off()
            for axes, found in zip(panels, one.answers, strict=False):
                _draw_method(axes, one, found)
        return drawing.write_figure(figure, folder, "fig1", caption, tables(examples))


def heading(one: Example) -> str:
    """Return image, question and truth, in lines that fit."""
    truth = "" if one.truth is None else f" Truth: {one.truth}"
    return textwrap.fill(f"{Path(str(one.question.image)).name}: {one.question.bare}{truth}", 90)


def _draw_method(axes: Any, one: Example, found: ShownAnswer) -> None:
    is_full = found.pruner.name == "none"
    tokens = None if is_full else found.tokens
    axes.imshow(panel(list(one.crops), one.side, tokens, scale=1), interpolation="antialiased")
    number = counts(found.tokens)
    name = "all tokens" if is_full else found.pruner.name
    axes.set_title(
        f"{name}\n{count_text(number | {'unplaced': 0} if number['merged'] else number)}",
        loc="center",
        fontsize=6.2,
        fontweight="normal",
        pad=2,
        linespacing=1.1,
    )
    mark = _WORDS[found.right]
    answer = " ".join(found.answer.split()) or "(empty)"
    shown = answer if len(answer) <= 18 else answer[:16] + "..."
    text = drawing.literal(f"{shown}: {mark}" if mark else shown)
    axes.text(
        0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=6.5,
        color=_COLORS[found.right], fontweight="bold" if found.right is False else "normal",
    )  # fmt: skip


def tables(examples: Sequence[Example]) -> dict[str, Table]:
    """Return answers, and the patches that every token stands for."""
    answers, patches = [], []
    for one in examples:
        about = [Path(str(one.question.image)).name, one.question.question_id]
        for found in one.answers:
            number = counts(found.tokens)
            right = "" if found.right is None else int(found.right)
            name = found.pruner.name
            answers.append(
                [*about, one.question.bare, one.truth or "", name, *number.values(), found.answer, right]
            )
            for crop, tokens in enumerate(found.tokens if name != "none" else ()):
                for patch, important in zip(tokens.kept.tolist(), tokens.important.tolist(), strict=True):
                    patches.append([*about, name, crop, patch, "important" if important else "kept", ""])
                for patch, token in enumerate([] if tokens.groups is None else tokens.groups.tolist()):
                    if token >= 0:
                        patches.append([*about, name, crop, patch, "merged", token])
    sizes = ["tokens", "important", "merged", "global"]
    return {
        "answers": (
            ["image", "question_id", "question", "truth", "method", *sizes, "answer", "right"],
            answers,
        ),
        "patches": (["image", "question_id", "method", "crop", "patch", "role", "token"], patches),
    }


def caption(
    examples: Sequence[Example], model: str, tokens: int, reasons: dict[str, str], is_bundled: bool
) -> str:
    """Return what is shown, and what it can and cannot show."""
    sets = [
        f"the first question about {Path(str(one.question.image)).name} "
        + ("on which the methods differ" if one.differs else "(all methods agree)")
        for one in examples
    ]
    text = [
        f"{model}: what each method keeps of an image at {tokens} tokens per crop, and its answer. Shown: "
        f"{'; '.join(sets)}.",
        "Global tokens stand for no single place ([CLS], the rest of the image, new tokens of a decoder). "
        "Methods inside the language model meet the budget as a mean over layers or from a layer on; shown "
        "are the tokens after their last stage.",
    ]
    if reasons:
        text.append(f"Not available with this model or budget: {', '.join(reasons)}.")
    note = "Single questions illustrate how methods choose; they say nothing about which one is better."
    if is_bundled:
        note += (
            " This small model was trained on drawn scenes, so that photographs are new to it, and methods "
            "inside its decoder have few layers to act in."
        )
    return " ".join([*text, note])


def run(
    args: argparse.Namespace, session: Session, found: list[tuple[Task, dict[int, str]]]
) -> dict[str, Any]:
    """Draw the figure of the questions `found` and return its document."""
    pruners = [get_pruner("none"), *(get_pruner(name, args.tokens, seed=args.seed) for name in args.methods)]
    reasons: dict[str, str] = {}
    examples = [example(session, task, truths, pruners, reasons) for task, truths in found]
    cli.print_warnings([f"left out: {reason}" for reason in reasons.values()])
    text = caption(examples, session.job.name, args.tokens, reasons, cli.is_bundled(args.model))
    files = draw(examples, text, args.output / "fig1")
    return {
        "figure": "fig1",
        "model": session.job.name,
        "tokens": args.tokens,
        "examples": [
            {
                "image": str(one.question.image),
                "question_id": one.question.question_id,
                "question": one.question.bare,
                "truth": one.truth,
                "methods": {
                    found.pruner.name: {"answer": found.answer, "right": found.right, **counts(found.tokens)}
                    for found in one.answers
                },
            }
            for one in examples
        ],
        "unavailable": reasons,
        "files": files,
        "caption": text,
    }

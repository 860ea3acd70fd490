"""What is damaged: folders with small inputs of every kind, and the commands that read them.

A subject writes its folder once. A call damages one of its files, runs a command in this process, and
restores the file. Every command is called as from a shell: `main(argv)`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from helpers.fake_llava import FakeLlava, FakeProcessor, FakeTokenizer
from helpers.score_files import write_score
from llava.eval import compare, data, model_vqa_loader, score, submit
from llava.eval.jobs import session
from llava.eval.tables import __main__ as tables

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "benchmarks"
CHECKPOINT = "ckpt_llava15s"

Main = Callable[[Sequence[str]], int]


@dataclass
class Subject:
    """Files that belong together.

    Attributes:
        build: Writes the files into a folder.
        damaged: Patterns of the files to damage.
        commands: (name, main, arguments); {} in an argument is the folder. The score of commands named
            `score` is compared with the score of the whole files.
        fake: Answer with a fake model instead of a real one.
        share: How many calls this subject gets, relative to others.
        rounded: Scores that differ by less are equal: sums in another order differ in the last bit, which the
            official rounding may show.
    """

    name: str
    build: Callable[[Path], None]
    damaged: tuple[str, ...]
    commands: list[tuple[str, Main, list[str]]]
    fake: bool = False
    share: int = 10
    rounded: float = 1e-9
    written: tuple[str, ...] = field(default=())  # what commands write, removed after each call

    def files(self, folder: Path) -> list[Path]:
        """Return the files that may be damaged, in order."""
        return sorted({path for one in self.damaged for path in folder.glob(one) if path.is_file()})


def _benchmark(
    name: str, folder: str, answers: str, *truth: str, other: str = "", judged: bool = False
) -> Subject:
    """Return the subject of a benchmark: its golden files and two answer files."""

    def build(target: Path) -> None:
        shutil.copytree(GOLDEN / folder, target, dirs_exist_ok=True)

    data_at, given = ["--benchmark", name, "--data", "{}"], f"{{}}/{answers}"
    commands: list[tuple[str, Main, list[str]]] = [
        ("score", score.main, [*data_at, "--answers", given]),
        ("fixed", score.main, [*data_at, "--answers", given, "--fixed"]),
        ("data", data.main, ["check", name, "--data", "{}"]),
    ]
    if not judged:
        commands += [
            ("compare", compare.main, [given, f"{{}}/{other or answers}", *data_at, "--resamples", "100"]),
            ("submit", submit.main, [*data_at, "--answers", given, "--output", "{}/submission"]),
        ]
    rounded = 0.11 if name == "mmvet" else 1e-9
    return Subject(name, build, (answers, *truth), commands, rounded=rounded, written=("submission*",))


def _tables() -> Subject:
    def build(folder: Path) -> None:
        write_score(folder / "results/gqa/a", "gqa", 60.0)
        write_score(folder / "results/pope/a", "pope", 80.0, visual_tokens=64.0, ci_low=79.0, ci_high=81.0)
        write_score(folder / "results/pope/b", "pope", 85.9, "none", None, None)

    arguments = ["--results", "{}/results", "--output", "{}/tables"]
    named = ("tables", tables.main, ["--table", "llava-1.5-7b", *arguments])
    free = ("summary", tables.main, arguments)
    return Subject("tables", build, ("results/*/*/score.json",), [named, free], share=1, written=("tables*",))


def _questions(folder: Path) -> None:
    for number in range(3):
        Image.new("RGB", (20 + number, 30), (90 * number, 40, 10)).save(folder / f"{number}.png")
    texts = ("Is it red?", "Is it blue?", "What is it?")
    rows = [
        {"question_id": number, "image": f"{number % 3}.png", "text": text, "category": "default"}
        for number, text in enumerate(texts * 2)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _ask() -> Subject:
    """Questions to a fake model, and the answers of an earlier start, from which it resumes."""
    arguments = ["--model-path", str(DATA / "model" / CHECKPOINT), "--image-folder", "{}", "--device", "cpu"]
    arguments += ["--question-file", "{}/q.jsonl", "--workers", "0", "--no-share-prefix", "--answers-file"]

    def build(folder: Path) -> None:
        _questions(folder)
        given = [part.replace("{}", str(folder)) for part in arguments]
        with fake_model():
            assert model_vqa_loader.main([*given, str(folder / "earlier.jsonl")]) == 0

    commands: list[tuple[str, Main, list[str]]] = [
        ("ask", model_vqa_loader.main, [*arguments, "{}/new.jsonl"]),
        ("resume", model_vqa_loader.main, [*arguments, "{}/earlier.jsonl"]),
    ]
    damaged = ("q.jsonl", "earlier.jsonl", "0.png")
    return Subject("questions", build, damaged, commands, fake=True, written=("new*",))


def _checkpoint(name: str, *kinds: str) -> Subject:
    """A whole checkpoint, loaded and asked one question."""

    def build(folder: Path) -> None:
        for one in (name, "ckpt_clip336p42"):
            shutil.copytree(DATA / "model" / one, folder / one)
        for path in folder.rglob("*"):
            path.chmod(path.stat().st_mode | 0o200)
        _questions(folder)
        (folder / "q.jsonl").write_text((folder / "q.jsonl").read_text().splitlines()[0] + "\n")

    arguments = ["--model-path", f"{{}}/{name}", "--image-folder", "{}", "--question-file", "{}/q.jsonl"]
    arguments += ["--device", "cpu", "--workers", "0", "--answers-file", "{}/new.jsonl", "--max_new_tokens"]
    command = ("load", model_vqa_loader.main, [*arguments, "1"])
    return Subject(name, build, (*kinds, "ckpt_clip336p42/*.json"), [command], share=1, written=("new*",))


class fake_model:  # noqa: N801 -- reads as a function
    """Context in which the commands answer with a fake model and load none."""

    def __enter__(self) -> None:
        self._real = session.load_model
        session.load_model = lambda job: (FakeLlava(), FakeTokenizer(), FakeProcessor())

    def __exit__(self, *_: object) -> None:
        session.load_model = self._real


def subjects() -> list[Subject]:
    """Return all subjects."""
    videos = ("test_q_1k.json", "test_a_1k.json")
    mme = "MME_Benchmark_release_version"
    scienceqa = ("problems.json", "pid_splits.json", "llava_test_CQM-I.json", "llava_test_CQM-A.json")
    return [
        _benchmark(
            "pope",
            "pope",
            "llava_answers_clean.jsonl",
            "llava_pope_test.jsonl",
            "coco/*.json",
            other="llava_answers_phrases.jsonl",
        ),
        _benchmark(
            "gqa", "gqa", "llava_answers_mixed.jsonl", "testdev_balanced_questions.json", "llava_gqa*"
        ),
        _benchmark("textvqa", "textvqa", "llava_answers_noisy.jsonl", "TextVQA*.json", "llava_textvqa*"),
        _benchmark("vqav2_val", "vqav2", "llava_answers_noisy.jsonl", "v2_*.json", "llava_vqav2_val.jsonl"),
        _benchmark("vizwiz_val", "vizwiz", "llava_answers_noisy.jsonl", "val.json", "llava_val.jsonl"),
        _benchmark("scienceqa", "scienceqa", "llava_answers_letters_full.jsonl", *scienceqa),
        _benchmark(
            "mme", "mme", "answers/clean.jsonl", "llava_mme.jsonl", f"{mme}/*/*.txt", f"{mme}/*/*/*.txt"
        ),
        _benchmark("mmbench", "mmbench", "mmbench_dev_20230712/formats.jsonl", "mmbench_dev_20230712.tsv"),
        _benchmark(
            "mmbench_cn",
            "mmbench",
            "mmbench_dev_cn_20231003/formats.jsonl",
            "mmbench_dev_cn_20231003.tsv",
        ),
        _benchmark("mmvet", "mmvet", "toy_gpt-4-0613-grade-5runs.json", "mm-vet.json", judged=True),
        _benchmark("msvd", "video/MSVD_Zero_Shot_QA", "judge_replies.json", *videos, judged=True),
        _benchmark(
            "activitynet", "video/Activitynet_Zero_Shot_QA", "judge_replies.json", *videos, judged=True
        ),
        _tables(),
        _ask(),
        _checkpoint("ckpt_llava15s", "ckpt_llava15s/*.json", "ckpt_llava15s/pytorch_model-00001*"),
        _checkpoint("ckpt_llava16s", "ckpt_llava16s/*.json", "ckpt_llava16s/model-00001*"),
    ]

"""LLaVA's question loop for MMBench: asks the rows of a TSV that contains the images.

    python -m llava.eval.model_vqa_mmbench --model-path CHECKPOINT --question-file mmbench_dev_20230712.tsv \\
        --answers-file answers.jsonl --single-pred-prompt --temperature 0 --conv-mode vicuna_v1 [--lang cn]
"""

from __future__ import annotations

if not __package__:  # run by its path, as in LLaVA's documents: import this repository
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence

from llava.eval import cli, model_vqa_loader
from llava.eval.benchmarks import DataError, DataIssue, Question
from llava.eval.benchmarks.mmbench import MMBench, MMBenchCN

_BENCHMARKS = {"en": MMBench, "cn": MMBenchCN}


def all_rounds(questions: Iterable[Question], suffix: str) -> Iterator[Question]:
    """Yield every question once per rotation of its options, numbered by `round_id`, as LLaVA does.

    `option_char` of the answer holds, for every letter of the prompt, the letter of that option in the file.
    """
    index = 0
    for question in questions:
        texts, letters = question.extra["options"], question.extra["option_char"]
        head = question.extra["prompt"].removesuffix(_options(letters, texts))
        for number in range(len(texts)):
            turned = texts[number:] + texts[:number]
            prompt = head + _options(letters, turned)
            extra = {"options": turned, "option_char": letters[number:] + letters[:number]}
            extra = {**question.extra, "prompt": prompt, "round_id": number, **extra}
            yield dataclasses.replace(question, index=index, text=prompt + suffix, extra=extra)
            index += 1


def _options(letters: Sequence[str], texts: Sequence[str]) -> str:
    return "".join(f"\n{letter}. {text}" for letter, text in zip(letters, texts, strict=True))


def language_warnings(questions: Sequence[Question], lang: str) -> list[str]:
    """Return a warning if the questions are in the other language than the instruction."""
    chinese = sum(any("\u4e00" <= char <= "\u9fff" for char in one.extra["prompt"]) for one in questions)
    found = "cn" if 2 * chinese > len(questions) else "en"
    if found == lang or not questions:
        return []
    share = f"{chinese} of {len(questions)} questions contain Chinese characters"
    return [f"--lang {lang}: {share}. Use --lang {found}, as published numbers do"]


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = model_vqa_loader.build_parser("model_vqa_mmbench", __doc__, max_new_tokens=1024)
    note = "ask for the letter alone, as for LLaVA-1.5"
    parser.add_argument("--single-pred-prompt", action="store_true", help=note)
    note = "language of that instruction (default: en)"
    parser.add_argument("--lang", choices=_BENCHMARKS, default="en", help=note)
    note = "ask every row once per rotation of its options; MMBench's own files list the rotations as rows"
    parser.add_argument("--all-rounds", action="store_true", help=note)
    args = parser.parse_args(argv)
    if not args.question_file.is_file():
        raise DataError(f"{args.question_file}: no such question file")
    benchmark = _BENCHMARKS[args.lang]()
    if not args.single_pred_prompt:
        benchmark.instruction = ""
    issues: list[DataIssue] = []
    questions = list(benchmark.questions(args.question_file, issues))
    warnings = language_warnings(questions, args.lang) if args.single_pred_prompt else []
    if args.all_rounds:
        questions = list(all_rounds(questions, benchmark.instruction))
    return model_vqa_loader.answer(args, parser, questions, issues, benchmark, warnings)


if __name__ == "__main__":
    sys.exit(main())

"""LLaVA's question loop for ScienceQA: asks the conversations of a JSON list, with and without images.

    python -m llava.eval.model_vqa_science --model-path CHECKPOINT --question-file llava_test_CQM-A.json \\
        --image-folder images/test --answers-file answers.jsonl --single-pred-prompt --temperature 0 \\
        --conv-mode vicuna_v1
"""

from __future__ import annotations

if not __package__:  # run by its path, as in LLaVA's documents: import this repository
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import sys
from collections.abc import Sequence

from llava.eval import cli, model_vqa_loader
from llava.eval.benchmarks import DataError, DataIssue
from llava.eval.benchmarks.base import LETTER_ANSWER
from llava.eval.benchmarks.scienceqa import read_conversations


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = model_vqa_loader.build_parser("model_vqa_science", __doc__, "llava_v0", 1024)
    note = "ask for the letter alone, as for LLaVA-1.5"
    parser.add_argument("--single-pred-prompt", action="store_true", help=note)
    note = "accepted as in LLaVA, without effect: no second question asks for the letter"
    parser.add_argument("--answer-prompter", action="store_true", help=note)
    args = parser.parse_args(argv)
    if not args.question_file.is_file():
        raise DataError(f"{args.question_file}: no such question file")
    issues: list[DataIssue] = []
    suffix = LETTER_ANSWER if args.single_pred_prompt else ""
    folder, outside = args.image_folder, args.allow_outside_images
    found = read_conversations(args.question_file, folder, issues, suffix, allow_outside=outside)
    questions = list(found)
    model_vqa_loader.check_image_folder(folder, questions)
    warnings = []
    if args.answer_prompter:
        what = "--answer-prompter: no second question is asked, so free answers are scored as they are"
        warnings.append(f"{what}. Use --single-pred-prompt to ask for the letter")
    return model_vqa_loader.answer(args, parser, questions, issues, warnings=warnings)


if __name__ == "__main__":
    sys.exit(main())

"""LLaVA's question loop for long answers (MM-Vet, LLaVA-Bench): `model_vqa_loader` with up to 1,024 tokens.

    python -m llava.eval.model_vqa --model-path CHECKPOINT --question-file llava-mm-vet.jsonl \\
        --image-folder images --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

if not __package__:  # run by its path, as in LLaVA's documents: import this repository
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import sys
from collections.abc import Sequence

from llava.eval import cli, model_vqa_loader
from llava.eval.benchmarks import DataIssue


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = model_vqa_loader.build_parser("model_vqa", __doc__, max_new_tokens=1024)
    args = parser.parse_args(argv)
    issues: list[DataIssue] = []
    return model_vqa_loader.answer(args, parser, model_vqa_loader.read_plain(args, issues), issues)


if __name__ == "__main__":
    sys.exit(main())

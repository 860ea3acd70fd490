"""Convert VQAv2 answers to the server's file: LLaVA's script as a wrapper of `llava.eval.submit`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works without an installation

from llava.eval.submit import main as submit  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("playground/data/eval/vqav2"))
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--split", required=True)
    args = parser.parse_args()
    answers = args.dir / "answers" / args.split / args.ckpt / "merge.jsonl"
    output = args.dir / "answers_upload" / args.split / f"{args.ckpt}.json"
    sys.exit(
        submit(
            [
                "--benchmark",
                "vqav2",
                "--data",
                str(args.dir),
                "--answers",
                str(answers),
                "--output",
                str(output),
                "--skip-invalid",
            ]
        )
    )

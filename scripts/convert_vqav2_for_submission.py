"""Convert VQAv2 answers to the server's file: LLaVA's script as a wrapper of `llava.eval.submit`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works without an installation

from llava.eval.submit import main as submit  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--dir", type=Path, default=Path("playground/data/eval/vqav2"), help="(default: %(default)s)")
    add("--ckpt", help="reads DIR/answers/SPLIT/CKPT/merge.jsonl, writes DIR/answers_upload/SPLIT/CKPT.json")
    add("--split", help="see --ckpt")
    add("--src", help="answers, relative to DIR; in place of --ckpt and --split")
    add("--dst", help="file to write, relative to DIR")
    args = parser.parse_args()
    if [bool(value) for value in (args.src, args.dst, args.ckpt, args.split)] not in (
        [True, True, False, False],
        [False, False, True, True],
    ):
        parser.error("expected either --ckpt and --split, or --src and --dst")
    answers = args.src or Path("answers", args.split, args.ckpt, "merge.jsonl")
    output = args.dst or Path("answers_upload", args.split, f"{args.ckpt}.json")
    sys.exit(
        submit(
            [
                *("--benchmark", "vqav2"),
                *("--data", str(args.dir)),
                *("--answers", str(args.dir / answers)),
                *("--output", str(args.dir / output)),
                "--skip-invalid",
            ]
        )
    )

"""Convert MMBench answers to the server's xlsx: LLaVA's script as a wrapper of `llava.eval.submit`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works without an installation

from llava.eval.submit import main as submit  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="the TSV, English or Chinese")
    parser.add_argument("--result-dir", type=Path, required=True)
    parser.add_argument("--upload-dir", type=Path, required=True)
    parser.add_argument("--experiment", required=True)
    args = parser.parse_args()
    sys.exit(
        submit(
            [
                "--benchmark",
                "mmbench",
                "--questions",
                args.annotation_file,
                "--answers",
                str(args.result_dir / f"{args.experiment}.jsonl"),
                "--output",
                str(args.upload_dir / f"{args.experiment}.xlsx"),
            ]
        )
    )

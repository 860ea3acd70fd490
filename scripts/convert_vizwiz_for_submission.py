"""Convert VizWiz answers to the server's file: LLaVA's script as a wrapper of `llava.eval.submit`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works without an installation

from llava.eval.submit import main as submit  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="LLaVA's question jsonl")
    parser.add_argument("--result-file", required=True)
    parser.add_argument("--result-upload-file", required=True)
    args = parser.parse_args()
    sys.exit(
        submit(
            [
                "--benchmark",
                "vizwiz",
                "--questions",
                args.annotation_file,
                "--answers",
                args.result_file,
                "--output",
                args.result_upload_file,
            ]
        )
    )

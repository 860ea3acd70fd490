"""Convert MM-Vet answers to the file of its evaluator: LLaVA's script as a wrapper of `llava.eval.submit`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works without an installation

from llava.eval.submit import main as submit  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", required=True)
    parser.add_argument("--dst", required=True)
    args = parser.parse_args()
    sys.exit(submit(["--benchmark", "mmvet", "--answers", args.src, "--output", args.dst]))

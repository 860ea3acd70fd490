"""Convert MME answers to its calculator's text files: LLaVA's script as a wrapper of `llava.eval.submit`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works without an installation

from llava.eval.submit import main as submit  # noqa: E402

RELEASE = "MME_Benchmark_release_version"
USUAL = Path("playground/data/eval/MME")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", required=True)
    parser.add_argument(
        "--data_path",
        "--data-path",
        type=Path,
        help="folder of MME, or the release in it (default: this folder, as for LLaVA's own script, else "
        "playground/data/eval/MME)",
    )
    args = parser.parse_args()
    folder = args.data_path or (Path(".") if Path(RELEASE).is_dir() else USUAL)
    folder = folder.parent if folder.name == RELEASE else folder
    sys.exit(
        submit(
            [
                "--benchmark",
                "mme",
                "--data",
                str(folder),
                "--answers",
                str(folder / "answers" / f"{args.experiment}.jsonl"),
                "--output",
                str(folder / "eval_tool" / "answers" / args.experiment),
            ]
        )
    )

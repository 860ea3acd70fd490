"""Score SEED-Bench answers and write the server's file, under the arguments of LLaVA's script."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works without an installation

from llava.eval import cli  # noqa: E402
from llava.eval.benchmarks.base import grouped, mean
from llava.eval.benchmarks.files import read_answers, read_json
from llava.eval.benchmarks.joining import check_foreign, check_not_empty
from llava.eval.benchmarks.shapes import ID
from llava.eval.store.atomic import check_output, write_atomically  # noqa: E402

QUESTION = {"question_id": ID, "answer": str, "question_type_id?": ID, "data_type?": str}
SHAPE = {"questions": [QUESTION], "question_type?": {str: ID}}


@cli.guarded
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--annotation-file", type=cli.path_argument, required=True, help="SEED-Bench.json, with the answers")
    add("--result-file", type=cli.path_argument, required=True)
    add("--result-upload-file", type=cli.path_argument, required=True)
    args = parser.parse_args(argv)
    check_output(args.result_upload_file, args.annotation_file, args.result_file)
    document = read_json(args.annotation_file, dict, SHAPE)
    # Ids are numbers in one file and texts in another.
    truth = {str(row["question_id"]): row for row in document["questions"]}
    names = {str(number): name for name, number in document.get("question_type", {}).items()}
    rows = read_answers(args.result_file)
    check_not_empty(args.result_file, rows)
    answers = {str(row["question_id"]): row["text"] for row in rows}
    if repeated := len(rows) - len(answers):
        cli.print_warnings([f"{repeated} answers are to a question answered before; the last one counts"])
    check_foreign(list(answers), truth, args.annotation_file, "question_id")
    scores = [(truth[key], float(text == truth[key]["answer"])) for key, text in answers.items()]
    for key in ("question_type_id", "data_type"):
        for name, values in sorted(grouped((row.get(key), value) for row, value in scores).items()):
            print(f"{names.get(name, name)}: {100 * mean(values):.2f}% of {len(values)}")
    print(f"Total: {100 * mean(value for _, value in scores):.2f}% of {len(scores)}")
    if unread := sum(text not in tuple("ABCD") for text in answers.values()):
        cli.print_warnings([f"{unread} answers are not one of the letters A to D; they count as wrong"])
    if missing := len(truth) - len(answers):
        cli.print_warnings([f"{missing} of {len(truth)} questions have no answer; they are left out"])
    lines = (json.dumps({"question_id": key, "prediction": text}) + "\n" for key, text in answers.items())
    args.result_upload_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.result_upload_file, (line.encode() for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whole runs on a golden checkpoint where answers have a benchmark's own shape: generated, stored, scored."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava.eval import run
from llava.eval.benchmarks import get_benchmark

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "model" / "ckpt_llava15s"


def ask(benchmark: str, data: Path, output: Path, capsys) -> tuple[list[dict], dict]:
    command = [
        "--benchmark",
        benchmark,
        "--model",
        str(MODEL),
        "--data",
        str(data),
        "--output",
        str(output),
        "--tokens",
        "4",
        "--max-new-tokens",
        "2",
        "--batch-size",
        "8",
        "--submit",
    ]
    assert run.main(command) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()], document


def png(color: tuple[int, int, int]) -> bytes:
    content = BytesIO()
    Image.new("RGB", (20, 16), color).save(content, "PNG")
    return content.getvalue()


def test_mmbench_with_images_in_its_table(tmp_path, capsys):
    source = (DATA / "benchmarks" / "mmbench" / "mmbench_dev_20230712.tsv").read_text(encoding="utf-8")
    header, *rows = [line.split("\t") for line in source.splitlines()]
    bases = [row[0] for row in rows[:3]]
    kept = [row for row in rows if str(int(row[0]) % 1_000_000) in bases]
    for row in kept:
        number = bases.index(str(int(row[0]) % 1_000_000))
        row[header.index("image")] = base64.b64encode(png((80 * number, 40, 90))).decode()
    (tmp_path / "mmbench_dev_20230712.tsv").write_text(
        "".join("\t".join(row) + "\n" for row in [header, *kept]), encoding="utf-8"
    )
    answers, document = ask("mmbench", tmp_path, tmp_path / "out", capsys)
    theirs = get_benchmark("mmbench").read_answers(
        DATA / "benchmarks" / "mmbench" / "mmbench_dev_20230712" / "letters_95.jsonl"
    )
    theirs = {row["question_id"]: row for row in theirs}
    assert len(answers) == len(kept) == document["answered"]
    for row in answers:
        expected = theirs[row["question_id"]]
        assert {key: row[key] for key in ("prompt", "round_id", "options", "option_char")} == {
            key: expected[key] for key in ("prompt", "round_id", "options", "option_char")
        }
        assert row["metadata"]["visual_tokens"] == 4
    assert document["details"]["questions"] == 3 and document["details"]["rows"] == len(kept)
    assert document["submission"] == str(tmp_path / "out" / "answers_submission.xlsx")
    sheet = get_benchmark("mmbench").read_answers(document["submission"])
    assert [row["text"] for row in sheet] == [row["text"] for row in answers]


@pytest.mark.parametrize("name, count", [("scienceqa", 2), ("scienceqa_full", 5)])
def test_scienceqa_with_and_without_images(name, count, tmp_path, capsys):
    source = DATA / "benchmarks" / "scienceqa"
    rows = json.loads((source / "llava_test_CQM-A.json").read_text())
    with_image = [row for row in rows if "image" in row][:2]
    bare = [row for row in rows if "image" not in row][:3]
    ids = [row["id"] for row in with_image + bare]
    (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(bare + with_image))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ids}))
    problems = json.loads((source / "problems.json").read_text())
    (tmp_path / "problems.json").write_text(json.dumps({key: problems[key] for key in ids}))
    for row in with_image:
        path = tmp_path / "images" / "test" / row["image"]
        path.parent.mkdir(parents=True)
        path.write_bytes(png((10, 200, 30)))
    answers, document = ask(name, tmp_path, tmp_path / "out", capsys)
    assert len(answers) == count
    seen = {
        row["question_id"]: (row["prompt"].startswith("<image>\n"), row["metadata"]["visual_tokens"])
        for row in answers
    }
    assert all(seen[row["id"]] == (True, 4) for row in with_image)
    assert all(seen[row["id"]] == (False, 0) for row in bare if row["id"] in seen)
    assert document["details"]["img_count"] == 2 and document["score"] == document["details"]["img_accuracy"]
    assert document["submission"] is None  # there is no server

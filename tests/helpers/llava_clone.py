"""A folder as LLaVA's users have it: a checkpoint, and playground/data/eval with a few questions each.

    root = make_clone(tmp_path)

Contains `llava` and `scripts` of this repository, `liuhaotian/llava-v1.5-13b` (the bundled model), and under
playground/data/eval the files that LLaVA's and VisPruner's scripts name, made from the bundled data.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "playground" / "tiny"
CHECKPOINT = "llava-v1.5-13b"


def lines(path: Path, count: int | None = None) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def make_clone(root: Path) -> Path:
    """Fill `root`; return it."""
    link(root / "llava", ROOT / "llava")
    link(root / "scripts", ROOT / "scripts")
    link(root / "liuhaotian" / CHECKPOINT, TINY / "llava-tiny")
    source, data = TINY / "eval", root / "playground" / "data" / "eval"

    pope = lines(source / "pope" / "llava_pope_test.jsonl")
    labels = {}
    for category in ("adversarial", "popular", "random"):
        labels[category] = lines(source / "pope" / "coco" / f"coco_pope_{category}.json", 4)
        write_lines(data / "pope" / "coco" / f"coco_pope_{category}.json", labels[category])
    kept = [[row for row in pope if row["category"] == category][:4] for category in labels]
    write_lines(data / "pope" / "llava_pope_test.jsonl", sum(kept, []))
    link(data / "pope" / "val2014", source / "pope" / "val2014")

    for folder, name, images in (
        ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", "train_images"),
        ("gqa", "llava_gqa_testdev_balanced.jsonl", "data/images"),
        ("mm-vet", "llava-mm-vet.jsonl", "images"),
        ("MME", "llava_mme.jsonl", "MME_Benchmark_release_version"),
    ):
        write_lines(data / folder / name, lines(source / folder / name, 4))
        link(data / folder / images, source / folder / images)
    link(data / "textvqa" / "TextVQA_0.5.1_val.json", source / "textvqa" / "TextVQA_0.5.1_val.json")
    name = "gqa/data/testdev_balanced_questions.json"
    truth = json.loads((source / name).read_text(encoding="utf-8"))
    asked = [row["question_id"] for row in lines(data / "gqa" / "llava_gqa_testdev_balanced.jsonl")]
    (data / name).write_text(json.dumps({key: truth[key] for key in asked}), encoding="utf-8")
    link(data / "MME" / "convert_answer_to_mme.py", ROOT / "scripts" / "convert_answer_to_mme.py")

    vqa = lines(source / "vqav2" / "llava_vqav2_mscoco_val2014.jsonl", 6)
    write_lines(data / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", vqa[:4])
    write_lines(data / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", vqa)
    link(data / "vqav2" / "test2015", source / "vqav2" / "val2014")
    write_lines(data / "vizwiz" / "llava_test.jsonl", lines(source / "vizwiz" / "llava_val.jsonl", 4))
    link(data / "vizwiz" / "test", source / "vizwiz" / "val")

    questions = json.loads((source / "scienceqa" / "llava_test_CQM-A.json").read_text(encoding="utf-8"))
    with_image = [row for row in questions if "image" in row][:3]
    bare = [row for row in questions if "image" not in row][:2] or [
        {"id": "bare", "conversations": [{"from": "human", "value": "Which?\nA. one\nB. two"}]}
    ]
    problems = json.loads((source / "scienceqa" / "problems.json").read_text(encoding="utf-8"))
    problems["bare"] = {"question": "Which?", "choices": ["one", "two"], "answer": 0}
    science = data / "scienceqa"
    science.mkdir()
    (science / "llava_test_CQM-A.json").write_text(json.dumps([*bare, *with_image]))
    (science / "llava_test_CQM-I.json").write_text(json.dumps(with_image))
    ids = [row["id"] for row in (*bare, *with_image)]
    (science / "pid_splits.json").write_text(json.dumps({"test": ids, "val": ids[:1]}))
    (science / "problems.json").write_text(json.dumps({key: problems[key] for key in ids}))
    link(science / "images", source / "scienceqa" / "images")

    for folder, name in (("mmbench", "mmbench_dev_20230712"), ("mmbench_cn", "mmbench_dev_cn_20231003")):
        with (source / folder / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
            csv.field_size_limit(2**31 - 1)
            table = list(csv.reader(file, delimiter="\t"))
        (data / folder).mkdir()
        with (data / folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows(table[:5])

    letters = "\nA. yes\nB. no\nAnswer with the option's letter from the given choices directly."
    seed = [
        {**row, "text": row["text"].splitlines()[0] + letters, "category": "Scene"}
        for row in lines(data / "pope" / "llava_pope_test.jsonl", 4)
    ]
    write_lines(data / "seed_bench" / "llava-seed-bench.jsonl", seed)
    link(data / "seed_bench" / "SEED-Bench-image", source / "pope" / "val2014")
    for row in seed:
        row["image"] = "SEED-Bench-image/" + row["image"]
    write_lines(data / "seed_bench" / "llava-seed-bench.jsonl", seed)
    entries = [
        {"question_id": str(row["question_id"]), "question_type_id": 1, "answer": "A", "data_type": "image"}
        for row in seed
    ]
    document = {"questions": entries, "question_type": {"Scene Understanding": 1}}
    (data / "seed_bench" / "SEED-Bench.json").write_text(json.dumps(document))
    return root

"""Shell scripts of the shape of LLaVA's and VisPruner's scripts/v1_5/eval, run as they are.

They loop over CUDA_VISIBLE_DEVICES, start one process per GPU, join the chunks by `cat`, and convert or score
from the repository's root. Commands run in this process (see `helpers.shell_python`); one test starts real
ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from openpyxl import load_workbook

from helpers.llava_clone import CHECKPOINT, ROOT, lines, make_clone
from helpers.loaded import share_models
from helpers.shell_python import ShellPython

LOOP = """\
#!/bin/bash
gpus="${CUDA_VISIBLE_DEVICES:-0}"
IFS=',' read -ra LIST <<< "$gpus"
CHUNKS=${#LIST[@]}
"""
LOADER = "python -m llava.eval.model_vqa_loader --model-path liuhaotian/llava-v1.5-13b"
GREEDY = "--temperature 0 --conv-mode vicuna_v1"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def shell(root):
    """Run scripts in the clone; the checkpoint is loaded once."""
    with pytest.MonkeyPatch.context() as patch, ShellPython(root) as python:
        share_models(patch)
        yield python


def chunked(bench: str, split: str, questions: str, images: str, more: str = "", out: str = "$CKPT") -> str:
    """Return the loop of a script over GPUs and the `cat` of its chunks, for the split's answers."""
    data, answers = f"./playground/data/eval/{bench}", f"./playground/data/eval/{bench}/answers/$SPLIT/{out}"
    return f"""{LOOP}
CKPT="{CHECKPOINT}"
SPLIT="{split}"
for IDX in $(seq 0 $((CHUNKS-1))); do
    CUDA_VISIBLE_DEVICES=${{LIST[$IDX]}} {LOADER} \\
        --question-file {data}/{questions} \\
        --image-folder {data}/{images} \\
        --answers-file {answers}/${{CHUNKS}}_${{IDX}}.jsonl \\
        --num-chunks $CHUNKS \\
        --chunk-idx $IDX \\
        {GREEDY} {more} &
done
wait
output_file={answers}/merge.jsonl
> "$output_file"
for IDX in $(seq 0 $((CHUNKS-1))); do
    cat {answers}/${{CHUNKS}}_${{IDX}}.jsonl >> "$output_file"
done
"""


def single(module: str, bench: str, answers: str, *more: str) -> str:
    data = f"./playground/data/eval/{bench}"
    arguments = " \\\n    ".join([f"--answers-file {data}/answers/{answers}", GREEDY, *more])
    command = f"python -m llava.eval.{module} --model-path liuhaotian/llava-v1.5-13b"
    return f"#!/bin/bash\n{command} \\\n    {arguments}\n"


def plain(bench: str, questions: str, images: str, answers: str = f"{CHECKPOINT}.jsonl", *more: str) -> str:
    data = f"./playground/data/eval/{bench}"
    files = (f"--question-file {data}/{questions}", f"--image-folder {data}/{images}")
    return single("model_vqa_loader", bench, answers, *files, *more)


PRUNED = "--visual_token_num ${TOKEN} --important_ratio ${RATIO}"
HEAD = "TOKEN=$1\nRATIO=$2\n"
SETTING = "n_${TOKEN}/r_${RATIO}"


def good(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0 and "Traceback" not in done.stderr and "error:" not in done.stderr, (
        done.stdout + done.stderr
    )
    return done.stdout


def check(answers: Path, questions: Path, tokens: float | None = None) -> list[dict]:
    """Return the answers, which have LLaVA's keys and the questions' order."""
    rows, asked = lines(answers), lines(questions)
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in asked]
    keys = ["question_id", "prompt", "text", "answer_id", "model_id"]
    for row, question in zip(rows, asked, strict=True):
        assert list(row)[:5] == keys and row["model_id"] == CHECKPOINT
        assert row["prompt"] == question["text"] and row["metadata"]["temperature"] == 0
        assert tokens is None or row["metadata"]["visual_tokens"] == tokens
    return rows


def test_vqav2_on_two_gpus(root, shell):
    script = chunked("vqav2", "llava_vqav2_mscoco_test-dev2015", "$SPLIT.jsonl", "test2015")
    script += "python scripts/convert_vqav2_for_submission.py --split $SPLIT --ckpt $CKPT\n"
    good(shell.run(script, CUDA_VISIBLE_DEVICES="0,1"))
    data, split = root / "playground/data/eval/vqav2", "llava_vqav2_mscoco_test-dev2015"
    rows = check(data / "answers" / split / CHECKPOINT / "merge.jsonl", data / f"{split}.jsonl")
    made = json.loads((data / "answers_upload" / split / f"{CHECKPOINT}.json").read_text())
    assert len(made) == 6 and [row["answer"] == "" for row in made[4:]] == [True, True]
    assert [row["question_id"] for row in made[:4]] == [row["question_id"] for row in rows]


def test_vqav2_pruned_with_source_and_destination(root, shell):
    out = f"$CKPT/{SETTING}"
    script = HEAD + chunked(
        "vqav2", "llava_vqav2_mscoco_test-dev2015", "$SPLIT.jsonl", "test2015", PRUNED, out
    )
    files = f"--src answers/$SPLIT/{out}/merge.jsonl --dst answers_upload/$SPLIT/{out}.json"
    script += f"python scripts/convert_vqav2_for_submission.py --dir ./playground/data/eval/vqav2 {files}\n"
    good(shell.run(script, "16", "0.5", CUDA_VISIBLE_DEVICES="4,5,6"))  # more GPUs than needed: 2, 2, 0
    data, split = root / "playground/data/eval/vqav2", "llava_vqav2_mscoco_test-dev2015"
    merged = data / "answers" / split / CHECKPOINT / "n_16" / "r_0.5" / "merge.jsonl"
    check(merged, data / f"{split}.jsonl", tokens=16)
    made = data / "answers_upload" / split / CHECKPOINT / "n_16" / "r_0.5.json"
    assert len(json.loads(made.read_text())) == 6


def test_gqa(root, shell):
    script = chunked("gqa", "llava_gqa_testdev_balanced", "$SPLIT.jsonl", "data/images")
    script += """
GQADIR="./playground/data/eval/gqa/data"
python scripts/convert_gqa_for_eval.py --src $output_file --dst $GQADIR/testdev_balanced_predictions.json
cd $GQADIR
cat testdev_balanced_predictions.json
"""
    made = json.loads(good(shell.run(script, CUDA_VISIBLE_DEVICES="0,1,2,3")).splitlines()[-1])
    asked = lines(root / "playground/data/eval/gqa/llava_gqa_testdev_balanced.jsonl")
    assert [row["questionId"] for row in made] == [row["question_id"] for row in asked]


def test_pope_with_the_scorer_by_its_path(root, shell):
    script = HEAD + plain("pope", "llava_pope_test.jsonl", "val2014", f"llava/{SETTING}.jsonl", PRUNED)
    script += f"""
python llava/eval/eval_pope.py \\
    --annotation-dir ./playground/data/eval/pope/coco \\
    --question-file ./playground/data/eval/pope/llava_pope_test.jsonl \\
    --result-file ./playground/data/eval/pope/answers/llava/{SETTING}.jsonl
"""
    said = good(shell.run(script, "16", "0.5")).splitlines()
    assert [line for line in said if line.startswith("Category")] == [
        f"Category: {name}, # samples: 4" for name in ("adversarial", "popular", "random")
    ]
    assert said[-1].startswith("Average F1 score: ") and said.count("TP\tFP\tTN\tFN") == 3
    data = root / "playground/data/eval/pope"
    check(data / "answers/llava/n_16/r_0.5.jsonl", data / "llava_pope_test.jsonl", tokens=16)


def test_textvqa(shell):
    script = plain("textvqa", "llava_textvqa_val_v051_ocr.jsonl", "train_images")
    script += f"""
python -m llava.eval.eval_textvqa \\
    --annotation-file ./playground/data/eval/textvqa/TextVQA_0.5.1_val.json \\
    --result-file ./playground/data/eval/textvqa/answers/{CHECKPOINT}.jsonl
"""
    said = good(shell.run(script)).splitlines()
    assert said[:2] == [CHECKPOINT, "Samples: 4"] and said[2].startswith("Accuracy: ") and said[2][-1] == "%"


@pytest.mark.parametrize("name", ["A", "I"])
def test_scienceqa(root, shell, name):
    data = "./playground/data/eval/scienceqa"
    files = (f"--question-file {data}/llava_test_CQM-{name}.json", f"--image-folder {data}/images/test")
    script = single(
        "model_vqa_science", "scienceqa", f"{CHECKPOINT}{name}.jsonl", *files, "--single-pred-prompt"
    )
    script += f"""
python llava/eval/eval_science_qa.py \\
    --base-dir {data} \\
    --result-file {data}/answers/{CHECKPOINT}{name}.jsonl \\
    --output-file {data}/answers/{CHECKPOINT}_output.jsonl \\
    --output-result {data}/answers/{CHECKPOINT}_result.json
"""
    said = good(shell.run(script)).splitlines()
    answers = root / data / "answers"
    asked = json.loads((root / data / f"llava_test_CQM-{name}.json").read_text())
    rows = lines(answers / f"{CHECKPOINT}{name}.jsonl")
    assert [row["question_id"] for row in rows] == [row["id"] for row in asked]
    for row, question in zip(rows, asked, strict=True):
        assert row["prompt"].startswith("<image>\n") == ("image" in question)
        assert row["prompt"].endswith("letter from the given choices directly.")
    result = json.loads((answers / f"{CHECKPOINT}_result.json").read_text())
    total = len(result["results"])
    assert said[-1].startswith(
        f"Total: {total}, Correct: {result['correct']}, Accuracy: {result['acc']:.2f}%"
    )
    assert list(result) == ["acc", "correct", "count", "results", "outputs"] and result["count"] == total
    analysis = json.loads((answers / f"{CHECKPOINT}_output.jsonl").read_text())
    assert len(analysis["correct"]) == result["correct"]
    assert len(analysis["incorrect"]) == total - result["correct"]


@pytest.mark.parametrize(
    "bench, split, lang",
    [("mmbench", "mmbench_dev_20230712", ""), ("mmbench_cn", "mmbench_dev_cn_20231003", "--lang cn")],
)
def test_mmbench(root, shell, bench, split, lang):
    data = f"./playground/data/eval/{bench}"
    script = single(
        "model_vqa_mmbench",
        bench,
        f"{split}/{CHECKPOINT}.jsonl",
        f"--question-file {data}/{split}.tsv --single-pred-prompt {lang}",
    )
    script += f"""
mkdir -p {data}/answers_upload/{split}
python scripts/convert_mmbench_for_submission.py \\
    --annotation-file {data}/{split}.tsv \\
    --result-dir {data}/answers/{split} \\
    --upload-dir {data}/answers_upload/{split} \\
    --experiment {CHECKPOINT}
"""
    good(shell.run(script))
    rows = lines(root / data / "answers" / split / f"{CHECKPOINT}.jsonl")
    keys = ["question_id", "prompt", "text", "answer_id", "model_id", "round_id", "options", "option_char"]
    assert len(rows) == 4 and all(sorted(set(row) - {"metadata"}) == sorted(keys) for row in rows)
    assert not any("letter" in row["prompt"] or "选项" in row["prompt"] for row in rows)
    sheet = load_workbook(root / data / "answers_upload" / split / f"{CHECKPOINT}.xlsx").active
    predictions = [row[6].value for row in sheet.iter_rows()]
    assert predictions == ["prediction", *(row["text"] for row in rows)]


def test_mme(root, shell):
    script = plain("MME", "llava_mme.jsonl", "MME_Benchmark_release_version")
    script += f"""
cd ./playground/data/eval/MME
python convert_answer_to_mme.py --experiment {CHECKPOINT}
cd eval_tool
ls answers/{CHECKPOINT}
"""
    listed = good(shell.run(script)).splitlines()
    tasks = {row["category"] for row in lines(root / "playground/data/eval/MME/llava_mme.jsonl")}
    assert {f"{task}.txt" for task in tasks} <= set(listed)


def test_mme_of_the_fork(root, shell):
    script = HEAD + plain(
        "MME", "llava_mme.jsonl", "MME_Benchmark_release_version", f"{CHECKPOINT}/{SETTING}.jsonl", PRUNED
    )
    script += f"""
python scripts/convert_answer_to_mme.py --data_path ./playground/data/eval/MME \\
    --experiment {CHECKPOINT}/{SETTING}
"""
    good(shell.run(script, "16", "0.5"))
    made = root / "playground/data/eval/MME/eval_tool/answers" / CHECKPOINT / "n_16" / "r_0.5"
    assert list(made.glob("*.txt"))


def test_vizwiz(root, shell):
    data = "./playground/data/eval/vizwiz"
    script = plain("vizwiz", "llava_test.jsonl", "test")
    script += f"""
python scripts/convert_vizwiz_for_submission.py \\
    --annotation-file {data}/llava_test.jsonl \\
    --result-file {data}/answers/{CHECKPOINT}.jsonl \\
    --result-upload-file {data}/answers_upload/{CHECKPOINT}.json
"""
    good(shell.run(script))
    made = json.loads((root / data / "answers_upload" / f"{CHECKPOINT}.json").read_text())
    asked = lines(root / data / "llava_test.jsonl")
    assert [row["image"] for row in made] == [row["image"] for row in asked]


def test_mmvet(root, shell):
    data = "./playground/data/eval/mm-vet"
    files = (f"--question-file {data}/llava-mm-vet.jsonl", f"--image-folder {data}/images")
    script = single("model_vqa", "mm-vet", f"{CHECKPOINT}.jsonl", *files)
    script += f"""
mkdir -p {data}/results
python scripts/convert_mmvet_for_eval.py \\
    --src {data}/answers/{CHECKPOINT}.jsonl \\
    --dst {data}/results/{CHECKPOINT}.json
"""
    good(shell.run(script))
    rows = check(root / data / "answers" / f"{CHECKPOINT}.jsonl", root / data / "llava-mm-vet.jsonl")
    assert all(row["metadata"]["max_new_tokens"] == 1024 for row in rows)
    made = json.loads((root / data / "results" / f"{CHECKPOINT}.json").read_text())
    assert list(made.values()) == [row["text"] for row in rows]


def test_seed(root, shell):
    script = chunked("seed_bench", ".", "llava-seed-bench.jsonl", "")
    script += """
python scripts/convert_seed_for_submission.py \\
    --annotation-file ./playground/data/eval/seed_bench/SEED-Bench.json \\
    --result-file $output_file \\
    --result-upload-file ./playground/data/eval/seed_bench/answers_upload/llava-v1.5-13b.jsonl
"""
    said = good(shell.run(script, CUDA_VISIBLE_DEVICES="0,1"))
    data = root / "playground/data/eval/seed_bench"
    rows = check(data / "answers" / CHECKPOINT / "merge.jsonl", data / "llava-seed-bench.jsonl")
    upload = lines(data / "answers_upload" / "llava-v1.5-13b.jsonl")
    assert [row["prediction"] for row in upload] == [row["text"] for row in rows]
    share = 100 * sum(row["text"] == "A" for row in rows) / len(rows)
    assert said.splitlines() == [
        f"Scene Understanding: {share:.2f}% of 4",
        f"image: {share:.2f}% of 4",
        f"Total: {share:.2f}% of 4",
    ]


@pytest.mark.slow
def test_real_processes_answer_and_score(root):
    """Nothing in place of `python`: two processes at once, `cat`, and the scorer by its path."""
    script = chunked("pope", "two", "llava_pope_test.jsonl", "val2014")
    script += """
python llava/eval/eval_pope.py --annotation-dir ./playground/data/eval/pope/coco \\
    --question-file ./playground/data/eval/pope/llava_pope_test.jsonl --result-file $output_file
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert good(done).splitlines()[-1].startswith("Average F1 score: ")
    data = root / "playground/data/eval/pope"
    check(data / "answers/two" / CHECKPOINT / "merge.jsonl", data / "llava_pope_test.jsonl")
    assert (ROOT / "llava").samefile(root / "llava")

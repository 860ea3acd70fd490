"""docs/from_llava.md: every row of its tables is executed as it is written there.

A row needs an entry: `@row(START)` with the start of its first cell, on a function that prepares the row,
runs `do()`, and checks the result. To add a row, add both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.llava_clone import CHECKPOINT, ROOT, lines, make_clone, write_lines
from helpers.loaded import share_models
from helpers.shell_python import ShellPython

DOCUMENT = ROOT / "docs" / "from_llava.md"
_CODE = re.compile(r"`([^`]+)`")
_SHELL = ("python ", "bash ", "vispruner ")


def table_rows() -> Iterator[tuple[str, list[str]]]:
    """Yield (code of the first cell, all code to execute) of every row."""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        there, here = (cell.strip() for cell in line.strip("| ").split(" | "))
        (typed,) = _CODE.findall(there)
        codes = [typed] if here.startswith("the same") else []
        codes += [code for code in _CODE.findall(here) if code.startswith(_SHELL)]
        yield typed, codes or _CODE.findall(here)[:1]


ROWS = dict(table_rows())
ENTRIES: dict[str, Callable[..., None]] = {}


def row(start: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the function that executes the row whose first cell starts with `start`."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        assert start not in ENTRIES
        ENTRIES[start] = function
        return function

    return register


def entries_of(typed: str) -> list[str]:
    return [start for start in ENTRIES if typed.startswith(start)]


@dataclass
class Typist:
    """Types the code of a row."""

    shell: ShellPython
    root: Path
    codes: list[str]
    number: int
    names: dict[str, Any] = field(default_factory=dict)  # of Python code

    @property
    def data(self) -> Path:
        return self.root / "playground" / "data" / "eval"

    @property
    def answers(self) -> Path:
        return self.root / f"answers{self.number}.jsonl"

    def write_answers(self, questions: str, text: str = "Yes", path: Path | None = None) -> list[dict]:
        """Write answers to all questions of a file, as $A or as `path`."""
        source = self.data / questions
        if source.suffix == ".json":
            asked = [(one["id"], one["conversations"][0]["value"]) for one in json.loads(source.read_text())]
        else:
            asked = [(one["question_id"], one["text"]) for one in lines(source)]
        rows = [{"question_id": identity, "prompt": prompt, "text": text} for identity, prompt in asked]
        write_lines(path or self.answers, rows)
        return rows

    def do(self) -> list[str]:
        """Execute all code of the row; return the output of each."""
        outputs = []
        for code in self.codes:
            if not code.startswith(_SHELL):
                exec(code, self.names)
                continue
            variables = {"M": f"liuhaotian/{CHECKPOINT}", "D": "playground/data/eval", "A": self.answers.name}
            done = self.shell.run(code, **variables)
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
            outputs.append(done.stdout)
        return outputs


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    root = make_clone(tmp_path_factory.mktemp("clone"))
    with pytest.MonkeyPatch.context() as patch, ShellPython(root) as python:
        share_models(patch)
        yield python


def test_every_row_has_an_entry_and_every_entry_a_row():
    assert len(ROWS) > 20
    assert {typed: entries_of(typed) for typed in ROWS if len(entries_of(typed)) != 1} == {}
    used = [start for typed in ROWS for start in entries_of(typed)]
    assert sorted(used) == sorted(ENTRIES)


@pytest.mark.parametrize("typed", ROWS, ids=lambda typed: typed[:60])
def test_row(typed, shell):
    (start,) = entries_of(typed)
    typist = Typist(shell, shell.folder, ROWS[typed], list(ROWS).index(typed))
    ENTRIES[start](typist)


# -- ask ------------------------------------------------------------------------------------------


@row("python -m llava.eval.model_vqa_loader --model-path $M --question-file $D/pope/")
def _(typist: Typist) -> None:
    typist.do()
    assert len(lines(typist.answers)) == 12
    folder = typist.root / "outputs" / "pope" / CHECKPOINT / "none"
    texts = [[one["text"] for one in lines(path)] for path in (typist.answers, folder / "answers.jsonl")]
    assert texts[0] == texts[1] and (folder / "score.json").is_file()


@row("python -m llava.eval.model_vqa_loader --model-path $M --question-file $D/gqa/")
def _(typist: Typist) -> None:
    typist.do()
    assert [one["metadata"]["visual_tokens"] for one in lines(typist.answers)] == [64, 64]


@row("python -m llava.eval.model_vqa --model-path")
@row("python -m llava.eval.model_vqa_mmbench --model-path $M --question-file $D/mmbench/")
@row("python -m llava.eval.model_vqa_mmbench --model-path $M --question-file $D/mmbench_cn/")
def _(typist: Typist) -> None:
    typist.do()
    assert len(lines(typist.answers)) == 4


@row("python -m llava.eval.model_vqa_science")
def _(typist: Typist) -> None:
    typist.do()
    asked = json.loads((typist.data / "scienceqa" / "llava_test_CQM-A.json").read_text())
    assert [one["question_id"] for one in lines(typist.answers)] == [one["id"] for one in asked]


@row("python -m llava.eval.run_llava")
def _(typist: Typist) -> None:
    assert typist.do()[0].strip()


@row("from llava.eval.run_llava import eval_model")
def _(typist: Typist) -> None:
    image = next((typist.data / "pope" / "val2014").iterdir())
    model = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
    typist.names["args"] = SimpleNamespace(
        model_path=str(model), query="Is there a cat?", image_file=str(image), temperature=0, max_new_tokens=4
    )
    typist.do()


# -- score and submit -----------------------------------------------------------------------------


@row("python llava/eval/eval_pope.py")
def _(typist: Typist) -> None:
    typist.write_answers("pope/llava_pope_test.jsonl")
    printed, document = typist.do()
    mean = float(printed.splitlines()[-1].removeprefix("Average F1 score: "))
    assert 100 * mean == pytest.approx(json.loads(document.splitlines()[-1])["score"])


@row("python -m llava.eval.eval_science_qa")
def _(typist: Typist) -> None:
    typist.write_answers("scienceqa/llava_test_CQM-A.json", "A")
    assert typist.do()[0].startswith("Total: ")
    assert json.loads((typist.root / "result.json").read_text())["count"] == 5


@row("python -m llava.eval.eval_textvqa")
def _(typist: Typist) -> None:
    typist.write_answers("textvqa/llava_textvqa_val_v051_ocr.jsonl")
    assert typist.do()[0].splitlines()[1] == "Samples: 4"


@row("from llava.eval.m4c_evaluator import")
def _(typist: Typist) -> None:
    typist.names["pred_list"] = [{"pred_answer": "Red.", "gt_answers": ["red"] * 10}]
    typist.do()
    assert typist.names["score"] == 1


@row("python eval/eval.py")
def _(typist: Typist) -> None:
    typist.write_answers("gqa/llava_gqa_testdev_balanced.jsonl")
    assert json.loads(typist.do()[0].splitlines()[-1])["benchmark"] == "gqa"


@row("python calculation.py")
def _(typist: Typist) -> None:
    typist.write_answers("MME/llava_mme.jsonl")
    assert json.loads(typist.do()[0].splitlines()[-1])["score"] >= 0


@row("python scripts/convert_vqav2_for_submission.py --dir $D/vqav2 --split")
@row("python scripts/convert_vqav2_for_submission.py --dir $D/vqav2 --src")
def _(typist: Typist) -> None:
    folder = typist.data / "vqav2"
    merged = folder / "answers" / "SPLIT" / "NAME" / "merge.jsonl"
    typist.write_answers("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", path=merged)
    typist.do()
    name = "NAME.json" if "--src" in typist.codes[0] else "SPLIT/NAME.json"
    assert len(json.loads((folder / "answers_upload" / name).read_text())) == 6


@row("python scripts/convert_gqa_for_eval.py")
def _(typist: Typist) -> None:
    typist.write_answers("gqa/llava_gqa_testdev_balanced.jsonl")
    typist.do()
    made = json.loads((typist.root / "testdev_balanced_predictions.json").read_text())
    assert [one["prediction"] for one in made] == ["yes"] * 4


@row("python scripts/convert_mmvet_for_eval.py")
def _(typist: Typist) -> None:
    typist.write_answers("mm-vet/llava-mm-vet.jsonl")
    typist.do()
    assert len(json.loads((typist.root / "results.json").read_text())) == 4


@row("python scripts/convert_vizwiz_for_submission.py")
def _(typist: Typist) -> None:
    typist.write_answers("vizwiz/llava_test.jsonl")
    typist.do()
    assert len(json.loads((typist.root / "upload.json").read_text())) == 4


@row("python scripts/convert_mmbench_for_submission.py")
def _(typist: Typist) -> None:
    folder = typist.data / "mmbench"
    table = (folder / "mmbench_dev_20230712.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [{"question_id": int(line.split("\t")[0]), "text": "A"} for line in table]
    write_lines(folder / "answers" / "NAME.jsonl", rows)
    typist.do()
    assert (typist.root / "upload" / "NAME.xlsx").is_file()


@row("python scripts/convert_answer_to_mme.py")
def _(typist: Typist) -> None:
    path = typist.data / "MME" / "answers" / "NAME.jsonl"
    typist.write_answers("MME/llava_mme.jsonl", path=path)
    typist.do()
    assert list((typist.data / "MME" / "eval_tool" / "answers" / "NAME").glob("*.txt"))


@row("python scripts/convert_seed_for_submission.py")
def _(typist: Typist) -> None:
    typist.write_answers("seed_bench/llava-seed-bench.jsonl", "A")
    assert typist.do()[0].splitlines()[-1] == "Total: 100.00% of 4"
    assert len(lines(typist.root / "upload.jsonl")) == 4


# -- models ---------------------------------------------------------------------------------------


@row("ids, n = model.generate(")
def _(typist: Typist) -> None:
    import torch
    from PIL import Image

    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    folder = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), visual_token_num=16)
    image = Image.new("RGB", (40, 30), (200, 30, 30))
    ids = tokenizer_image_token("USER: <image>\nWhat? ASSISTANT:", tokenizer, return_tensors="pt")
    typist.names |= {"model": model, "input_ids": ids[None], "image_sizes": [image.size]}
    typist.names["images"] = process_images([image], processor, model.config)
    typist.do()
    assert isinstance(typist.names["ids"], torch.Tensor) and typist.names["n"] == 16


REFERENCE = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"


def training_arguments() -> SimpleNamespace:
    tower = REFERENCE.parent / "ckpt_clip336p42"
    return SimpleNamespace(
        vision_tower=str(tower), mm_vision_select_layer=-2, mm_projector_type="mlp2x_gelu",
        mm_use_im_start_end=True, mm_use_im_patch_token=False, tune_mm_mlp_adapter=False,
    )  # fmt: skip


@row("tokenizer, model, image_processor, context_len = load_pretrained_model(")
@row("config = AutoConfig.from_pretrained(")
@row("model = AutoModelForCausalLM.from_pretrained(")
@row("model = LlavaLlamaForCausalLM.from_pretrained(")
def _(typist: Typist) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import llava
    from llava.model import LlavaLlamaForCausalLM, load_pretrained_model

    names = [AutoConfig, AutoModelForCausalLM, LlavaLlamaForCausalLM, load_pretrained_model]
    typist.names |= {one.__name__: one for one in names}
    typist.names |= {"torch": torch, "model_path": str(REFERENCE), "model_name": "llava-v1.5-7b"}
    typist.do()
    if "config" in typist.names:
        assert type(typist.names["config"]) is llava.LlavaConfig
        return
    model = typist.names["model"]
    assert type(model) is LlavaLlamaForCausalLM and model.get_vision_tower().is_loaded
    assert model.get_visual_token_num() == 64
    assert model.dtype == (torch.float16 if "float16" in typist.codes[0] else torch.float32)


@row("n, ratio = model.get_visual_token_num()")
@row("model.save_pretrained(")
@row("vision_tower = model.get_vision_tower()")
@row("vision_tower = build_vision_tower(")
@row("model.get_model().initialize_vision_modules(")
@row("model.initialize_vision_tokenizer(")
def _(typist: Typist) -> None:
    import torch

    from llava.model import load_pretrained_model
    from llava.model.multimodal_encoder.builder import build_vision_tower

    tokenizer, model, _, _ = load_pretrained_model(str(REFERENCE), device="cpu")
    typist.names |= {
        "model": model,
        "tokenizer": tokenizer,
        "torch": torch,
        "build_vision_tower": build_vision_tower,
    }
    typist.names |= {"model_args": training_arguments(), "save_path": typist.root / "saved"}
    typist.do()
    if "n" in typist.names:
        assert (typist.names["n"], typist.names["ratio"]) == (64, 0.5)
    if "save_pretrained" in typist.codes[0]:
        assert type(model).from_pretrained(typist.root / "saved").get_vision_tower().is_loaded
    if "vision_tower" in typist.names:
        assert typist.names["vision_tower"].is_loaded != ("delay_load" in typist.codes[0])
    if "initialize_vision_tokenizer" in typist.codes[0]:
        assert len(model.get_input_embeddings().weight) == len(tokenizer)


@row("auto_upgrade(")
def _(typist: Typist) -> None:
    from llava.model.utils import auto_upgrade

    typist.names |= {"auto_upgrade": auto_upgrade, "model_path": str(REFERENCE)}
    typist.do()


@row("python scripts/merge_lora_weights.py")
@row("python -m llava.model.make_delta")
@row("python -m llava.model.apply_delta")
@row("python -m llava.model.consolidate")
def _(typist: Typist) -> None:
    import torch

    from helpers.checkpoints import write
    from helpers.lora import adapter, language_model
    from llava.model.builder import load_pretrained_model

    if not (typist.root / "vicuna").exists():
        language_model(typist.root / "vicuna")
        write(typist.root / "llava-model")
        adapter(typist.root / "lora", torch.float32)
    if "apply_delta" in typist.codes[0] and not (typist.root / "delta").exists():
        write(typist.root / "delta")
    typist.do()
    for name in ("merged", "merged2", "target", "consolidated"):
        if name in typist.codes[-1].split():
            load_pretrained_model(str(typist.root / name), device="cpu")

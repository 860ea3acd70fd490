"""Compare `llava.train` with reference data.

    PYTHONPATH=.:tests python -m helpers.golden_training DIR

DIR contains cases.json, a folder with the tokenizer.json of the ChatML cases, and maybe runs.json.
Checkpoints are found by name in DIR, DIR/../model and tests/data/model. The last line is one JSON object:
{"cases": n, "equal": m, "failed": [ids], "by_group": {group: [equal, cases]}}.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from helpers.golden_analysis import find_checkpoint
from helpers.golden_model import DATA
from helpers.golden_runs import NOT_COMPARED, NOT_WRITTEN
from helpers.golden_runs import entries as run_entries
from helpers.golden_video import Mismatch, expect, expect_close, expect_equal
from helpers.recipe_images import make_image
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle
from llava.model.builder import load_pretrained_model
from llava.model.image_processor import load_image_processor
from llava.model.tokenizer import load_tokenizer
from llava.pruning import get_pruner
from llava.train import sampler as samplers
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.forward import TrainingForward
from llava.train.preprocess import BadSample, preprocess, preprocess_multimodal, training_template
from llava.train.setup import detach_tower
from llava.train.trainer import parameter_groups

CASES = ("preprocess", "collator", "datasets", "samplers", "split_to_even_chunks", "steps")
LOSS, GRADIENT = 1e-5, 1e-4  # absolute, relative

# What differs on purpose, and why. Nothing else may differ.
DEVIATIONS = {
    "chatml_masks": "LLaVA counts tokens of ChatML rounds wrongly and masks all of a sample, or shifts the "
    "mask by a token per round; here exactly the answers and their <|im_end|> are targets",
    "fast_tokenizer": "LLaVA counts tokens of v1 and llama_2 as sentencepiece makes them, and raises "
    "AttributeError for tokenizers without `legacy`; here the answers are located in the text",
    "masked_items": "LLaVA trains on samples without any target, and on empty answers; here they are refused "
    "or replaced",
    "sampler": "LLaVA draws permutations within a modality from the global generator; the sampler of a run "
    "has its own, so of a run's order only the grouping is compared (the functions are, with both seeds)",
    "runs_losses": "most runs start from a projector that is not recorded; see helpers/golden_runs.py",
    "runs_dtypes": "trained weights are float32 here, so that small updates are not lost; others bfloat16",
    "runs_rates": "the log of transformers 5 has the rate of the step itself, that of 4 the next step's",
    "runs_tower": "the tower is outside of the module tree: none of its weights are saved",
    "runs_files": f"not written: {NOT_WRITTEN}",
    "runs_config": f"not compared: {NOT_COMPARED}",
}


def spans_of(ids: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
    """Return [start, end) of the runs of targets; a target has to equal its id."""
    spans: list[list[int]] = []
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label == IGNORE_INDEX:
            continue
        expect_equal(label, token, f"label {place}")
        if spans and spans[-1][1] == place:
            spans[-1][1] += 1
        else:
            spans.append([place, place + 1])
    return spans


def counts_rounds(template: Any) -> bool:
    return template.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)


def write_image(recipe: dict, path: Path) -> None:
    Image.fromarray(make_image(recipe["width"], recipe["height"], recipe["seed"])).save(path, format="PNG")


class TrainingReference:
    """A folder of reference data, with the tokenizers and checkpoints that its cases share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        self.tokenizers: dict[tuple, Any] = {}

    def checkpoint(self, name: str) -> Path:
        return find_checkpoint(self.folder, name)

    def tokenizer(self, kind: str, max_length: int, **options: Any) -> Any:
        """Return a tokenizer as LLaVA's training sets it up: the pad token is the unknown one."""
        key = (kind, *sorted(options.items()))
        if key not in self.tokenizers:
            patch, ends = options.pop("patch", False), options.pop("ends", False)
            tokenizer = load_tokenizer(self.tokenizer_folder(kind), **options)
            added = ["<im_patch>"] * patch + ["<im_start>", "<im_end>"] * ends
            tokenizer.add_tokens(added, special_tokens=True)
            tokenizer.pad_token = tokenizer.unk_token
            self.tokenizers[key] = tokenizer
        self.tokenizers[key].model_max_length = max_length
        return self.tokenizers[key]

    def tokenizer_folder(self, kind: str) -> Path:
        if kind == "bpe":
            places = (self.folder, DATA.parent / "train")
            found = [path.parent for place in places for path in sorted(place.glob("*/tokenizer.json"))]
        else:
            places = (self.folder, self.folder.parent / "model", DATA)
            found = [path.parent for place in places for path in sorted(place.glob("*/tokenizer.model"))]
        if not found:
            raise SystemExit(f"{self.folder}: no {kind} tokenizer is there, in ../model or in {DATA}.")
        return found[0]

    def entries(self) -> Iterator[tuple[str, str, Callable[[dict], None], dict]]:
        """Yield (group, id, check, case) of every case."""
        for group in CASES:
            for case in self.document.get(group, []):
                yield group, case["id"], getattr(self, f"check_{group}"), case

    # --- conversations -----------------------------------------------------------------------------------
    def check_preprocess(self, case: dict) -> None:
        tokenizer = self.tokenizer(
            case["tokenizer"],
            case["model_max_length"],
            legacy=case["legacy"],
            patch=case["mm_use_im_patch_token"],
            ends=case["mm_use_im_start_end"],
        )
        template, wanted, turns = training_template(case["version"]), case["expected"], case["conversations"]
        if case["has_image"] and case["is_multimodal"]:
            turns = preprocess_multimodal(turns, template, case["mm_use_im_start_end"])
        values = [turn["value"] for turn in turns]
        before = [turn["value"] for turn in case["conversations"]]
        expect_equal(values, wanted["after_preprocess_multimodal"] or before, "values")
        try:
            found = preprocess(turns, tokenizer, template, case["has_image"])
        except BadSample as error:
            expect(wanted["error"], f"refused: {error}")
            return
        ids = found.input_ids.tolist()
        spans = spans_of(ids, found.labels.tolist())
        if counts_rounds(template) and not hasattr(tokenizer, "legacy"):  # fast_tokenizer
            expect_equal(ids, wanted["input_ids"] or ids, "ids")
            self.check_answers(turns, ids, spans, tokenizer, template.sep2)
            return
        expect(not wanted["error"], f"no error, expected {wanted['error']}")
        expect_equal(ids, wanted["input_ids"], "ids")
        if template.sep_style is SeparatorStyle.MPT:  # chatml_masks
            if "derived_target_spans" in case:
                expect_equal(spans, case["derived_target_spans"], "targets")
            self.check_answers(turns, ids, spans, tokenizer, template.sep)
            return
        expect_equal(spans, wanted["target_spans"], "targets")
        expect_equal(found.mismatch and list(found.mismatch), wanted["mismatch"], "mismatch")

    def check_answers(
        self, turns: list[dict], ids: list[int], spans: list[list[int]], tokenizer: Any, end: str
    ) -> None:
        """Require that the targets are the answers with their end mark, up to the end of the ids."""
        turns = turns[int(turns[0]["from"] == "gpt") :]
        answers = [turn["value"] + end for turn in turns[1::2] if turn["value"]]
        texts = []
        for start, stop in spans:
            parts, run = [], []
            for token in [*ids[start:stop], None]:
                if token is None or token == IMAGE_TOKEN_INDEX:
                    parts, run = [*parts, tokenizer.decode(run)], []
                else:
                    run.append(token)
            texts.append("<image>".join(parts).strip())
        is_cut = len(ids) == tokenizer.model_max_length
        for place, text in enumerate(texts):
            answer = answers[place].strip()
            whole = text == answer or (is_cut and place == len(texts) - 1 and answer.startswith(text))
            expect(whole, f"target {place} is {text!r}, expected {answer!r}")
        expect(is_cut or len(texts) == len(answers), f"{len(texts)} targets, expected {len(answers)}")

    # --- batches -----------------------------------------------------------------------------------------
    def check_collator(self, case: dict) -> None:
        tokenizer = SimpleNamespace(
            pad_token_id=case["pad_token_id"], model_max_length=case["model_max_length"]
        )
        instances = []
        for one in case["instances"]:
            item = {name: torch.tensor(one[name]) for name in ("input_ids", "labels")}
            if one["image_shape"]:
                item["image"] = torch.zeros(one["image_shape"])
            instances.append(item)
        batch, wanted = DataCollatorForSupervisedDataset(tokenizer)(instances), case["expected"]
        for name in ("input_ids", "labels", "attention_mask"):
            expect_equal(batch[name].int().tolist(), wanted[name], name)
        images = batch.get("images")
        if images is not None:
            stacked = isinstance(images, torch.Tensor)
            images = {"stacked": list(images.shape)} if stacked else {"list": [list(i.shape) for i in images]}
        expect_equal(images, wanted["images"], "images")

    def check_datasets(self, case: dict) -> None:
        wanted, template = case["expected"], training_template(case["version"])
        tokenizer = self.tokenizer("sentencepiece", case.get("model_max_length", 2048))
        with tempfile.TemporaryDirectory() as scratch:
            for name, recipe in case["images"].items():
                write_image(recipe, Path(scratch, name))
            path = Path(scratch, "data.json")
            path.write_text(json.dumps(case["data"]), encoding="utf-8")
            dataset = LazySupervisedDataset(
                path,
                tokenizer,
                load_image_processor(self.checkpoint(case["tower"])),
                conversation=template,
                image_folder=scratch,
                image_aspect_ratio=case["image_aspect_ratio"],
                is_multimodal=True,
                bad_samples="skip",
            )
            items = [dataset[index] for index in range(len(dataset))]
            bad = dataset.bad
        expect_equal(len(dataset), len(wanted["items"]), "items")
        if not bad:
            expect_equal(dataset.lengths, wanted["lengths"], "lengths")
            expect_equal(dataset.modality_lengths, wanted["modality_lengths"], "modality lengths")
        for index, (item, one) in enumerate(zip(items, wanted["items"], strict=True)):
            if index in bad:
                refused = not one["target_spans"] or bad[index].kind == "empty answer"  # masked_items
                expect(refused, f"item {index} is refused: {bad[index]}")
                continue
            expect_equal(item["index"], index, "index")
            ids = item["input_ids"].tolist()
            expect_equal(ids, one["input_ids"], f"ids of item {index}")
            spans = spans_of(ids, item["labels"].tolist())
            if template.sep_style is SeparatorStyle.MPT:  # chatml_masks
                turns = preprocess_multimodal(case["data"][index]["conversations"], template)
                self.check_answers(turns, ids, spans, tokenizer, template.sep)
            else:
                expect_equal(spans, one["target_spans"], f"targets of item {index}")
            check_pixels(item["image"], one["image"], f"image of item {index}")

    def check_samplers(self, case: dict) -> None:
        function = getattr(samplers, case["function"])
        torch.manual_seed(case["manual_seed"])
        seed = case["generator_seed"]
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        try:
            found = function(case["lengths"], case["batch_size"], case["world_size"], generator=generator)
        except ValueError as error:
            expect(case["error"], f"refused: {error}")
            return
        expect(not case["error"], f"no error, expected {case['error']}")
        expect_equal(found, case["expected"], "indices")

    def check_split_to_even_chunks(self, case: dict) -> None:
        found = samplers.split_to_even_chunks(case["indices"], case["lengths"], case["num_chunks"])
        expect_equal(found, case["expected"], "chunks")

    # --- steps -------------------------------------------------------------------------------------------
    def check_steps(self, case: dict) -> None:
        """Compare loss and gradients of one batch, and four steps of the optimizer."""
        model, batch = self.model_and_batch(case)
        for part in ("finetune", "pretrain"):
            if not (wanted := case.get(part)):
                continue
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(part == "finetune" or "mm_projector" in name)
            check_gradients(model, batch, wanted, part)
        if wanted := case.get("adamw"):
            model.requires_grad_(True)
            check_optimizer(model, batch, wanted)

    def model_and_batch(self, case: dict) -> tuple[Any, dict[str, Any]]:
        """Load the checkpoint for training, and the samples through data set and collator."""
        folder = self.checkpoint(case["checkpoint"])
        _, model, processor, _ = load_pretrained_model(
            str(folder), device="cpu", device_map=None, dtype="float32", tower_dtype="float32"
        )
        detach_tower(model)
        model.train()
        model.config.tokenizer_model_max_length = case["tokenizer_model_max_length"]
        model.config.tokenizer_padding_side = "right"
        model.train_step = TrainingForward(get_pruner("none"))
        tokenizer = self.tokenizer("sentencepiece", case["tokenizer_model_max_length"])
        with tempfile.TemporaryDirectory() as scratch:
            data = []
            for index, sample in enumerate(case["samples"]):
                data.append({"id": index, "conversations": sample["conversations"]})
                if sample["has_image"]:
                    data[-1]["image"] = f"{index}.png"
                    write_image(sample["image"], Path(scratch, f"{index}.png"))
            Path(scratch, "data.json").write_text(json.dumps(data), encoding="utf-8")
            dataset = LazySupervisedDataset(
                Path(scratch, "data.json"),
                tokenizer,
                processor,
                conversation=training_template(case["version"]),
                image_folder=scratch,
                image_aspect_ratio=case.get("image_aspect_ratio", "pad"),
                model_config=model.config,
                is_multimodal=True,
            )
            items = [dataset[index] for index in range(len(dataset))]
        return model, DataCollatorForSupervisedDataset(tokenizer)(items)


def check_pixels(pixels: torch.Tensor, wanted: dict, what: str) -> None:
    expect_equal(list(pixels.shape), wanted["shape"], f"{what}: shape")
    expect_equal(str(pixels.dtype), f"torch.{wanted['dtype']}", f"{what}: dtype")
    if zlib.crc32(pixels.contiguous().numpy().tobytes()) == wanted["crc32"]:
        return
    flat = pixels.flatten().double()  # another release of the image library
    expect_close(flat[wanted["probe_index"]], wanted["probe"], 2e-6, f"{what}: probes")
    expect_close([flat.mean(), flat.std(correction=0)], [wanted["mean"], wanted["std"]], 2e-6, what)


def norm(gradients: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(one.double().square().sum()) for one in gradients))


def check_gradients(model: Any, batch: dict, wanted: dict, part: str) -> None:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    expect_close(loss.item(), wanted["loss"], LOSS, f"{part}: loss")
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    # A gradient of zeros keeps processes in step where there was none.
    empty = {name for name, grad in found.items() if grad is None or not grad.any()}
    expect(set(wanted["without_gradient"]) <= empty, f"{part}: weights without gradient: {sorted(empty)}")
    gradients = {name: grad for name, grad in found.items() if name not in wanted["without_gradient"]}
    expect(all(grad is not None for grad in gradients.values()), f"{part}: weights without gradient")
    expect_close(norm(list(gradients.values())), wanted["grad_norm"], 0, f"{part}: gradient norm", GRADIENT)
    if norms := wanted.get("grad_norms"):
        expect_equal(sorted(gradients), sorted(norms), f"{part}: names")
        for name, value in norms.items():
            expect_close(norm([gradients[name]]), value, 1e-7, f"{part}: gradient norm of {name}", GRADIENT)


def check_optimizer(model: Any, batch: dict, wanted: dict) -> None:
    """Run the steps with the groups of the trainer: decay on all but biases and norms."""
    decayed = [n for n, _ in model.named_parameters() if "norm" not in n and not n.endswith("bias")]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, decayed, wanted["weight_decay"], None),
        lr=wanted["learning_rate"],
        betas=tuple(wanted["betas"]),
        eps=wanted["eps"],
    )
    losses, norms = [], []
    for _ in wanted["losses"]:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), wanted["max_grad_norm"])))
        optimizer.step()
        losses.append(loss.item())
    expect_close(losses, wanted["losses"], LOSS, "adamw: losses", GRADIENT)
    expect_close(norms, wanted["grad_norms"], 0, "adamw: gradient norms", 10 * GRADIENT)


def run(folder: Path, groups: Sequence[str] = ()) -> dict[str, object]:
    """Return {"cases", "equal", "failed", "by_group"} of a folder; print what differs on standard error."""
    failed, by_group = [], {}
    entries = list(TrainingReference(folder).entries())
    if (folder / "runs.json").is_file() and (not groups or "runs" in groups):
        entries += run_entries(folder)
    for group, identity, check, case in entries:
        if groups and group not in groups:
            continue
        counts = by_group.setdefault(group, [0, 0])
        counts[1] += 1
        try:
            check(case)
            counts[0] += 1
        except (Mismatch, KeyError, ValueError, OSError) as error:
            failed.append(identity)
            print(f"{identity}: {type(error).__name__}: {error}", file=sys.stderr)
    count = sum(total for _, total in by_group.values())
    return {"cases": count, "equal": count - len(failed), "failed": failed, "by_group": by_group}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--groups", nargs="*", default=(), metavar="GROUP", help="only these (default: all)")
    args = parser.parse_args(argv)
    found = run(args.folder, args.groups)
    print(json.dumps(found))
    return 1 if found["failed"] or not found["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())

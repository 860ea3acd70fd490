"""Compare Video-LLaVA in its original layout with reference data: frames, pixels, towers, prompts, answers.

    PYTHONPATH=.:tests python -m helpers.golden_video DIR

DIR holds video.json (entries, tolerances in its `meta`), video_arrays.npz, checkpoints and video files. The
last line is one JSON object: {"cases": n, "equal": m, "failed": [ids]}. Everything goes through the
library's loader, frame sampler, processors, towers, pruners and generation.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from helpers.golden_model import unpack_mask
from helpers.recipe_frames import crc, make_frames, make_image
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import media_tags, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.features import VisionFeatures
from llava.model.splice import ContextLimits, splice
from llava.pruning import get_pruner
from llava.video_files import frame_indices, read_frames

METHODS = {"topk": "fastervlm", "vispruner": "vispruner"}  # by a part of a case's kind


class Mismatch(AssertionError):
    """What differs from the reference."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Mismatch(what)


def expect_equal(found: object, wanted: object, what: str) -> None:
    expect(found == wanted, f"{what}: {str(found)[:200]}, expected {str(wanted)[:200]}")


def expect_close(found: Any, wanted: Any, absolute: float, what: str, relative: float = 0.0) -> None:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    expect_equal(found.shape, wanted.shape, f"{what}: shape")
    bad = ~(np.abs(found - wanted) <= absolute + relative * np.abs(wanted))  # NaN is bad
    expect(
        not bad.any(), f"{what}: {bad.sum()} of {bad.size} values differ, by {np.abs(found - wanted).max()}"
    )


def expect_like(tensor: torch.Tensor, stats: dict, absolute: float, what: str, relative: float = 0.0) -> None:
    """Compare a tensor with its recorded shape, moments and probes (flat index, value)."""
    array = tensor.detach().double().cpu().numpy()
    expect_equal(list(array.shape), stats["shape"], f"{what}: shape")
    flat = array.ravel()
    places, values = zip(*stats["probe"], strict=True)
    expect_close(flat[list(places)], values, absolute, f"{what}: probes", relative)
    moments = [flat.mean(), flat.std(), np.abs(flat).max()]
    expect_close(moments, [stats[k] for k in ("mean", "std", "absmax")], absolute, what, relative)


@dataclass
class Reference:
    """A folder of reference data, with the models and encoded media that its entries share."""

    folder: Path
    models: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)
    encoded: dict[tuple[str, str], VisionFeatures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.document = json.loads((self.folder / "video.json").read_text(encoding="utf-8"))
        with np.load(self.folder / "video_arrays.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.tolerance = self.document["meta"]["tolerance"]
        self.first = self.document["cases"][0]["ckpt"]

    def model(self, name: str) -> tuple[Any, Any, Any]:
        """Load (tokenizer, model, image processor) of a checkpoint, once."""
        if name not in self.models:
            self.models[name] = load_pretrained_model(str(self.folder / name), device="cpu")[:3]
        return self.models[name]

    def pixels(self, entry: str, ckpt: str) -> torch.Tensor:
        """Return the pixels of "video/NAME" or "image/NAME/MODE"."""
        kind, name, *mode = entry.split("/")
        _, model, processor = self.model(ckpt)
        if kind == "video":
            clip = self.document["clips"][name]
            expect_equal(frame_indices(clip["n"]), clip["indices"], "frame indices")
            frames = make_frames(*clip["size"], clip["seed"], clip["indices"])
            expect_equal(crc(frames), clip["u8_crc"], "checksum of the generated clip")
            media = [Image.fromarray(frame) for frame in frames]
        else:
            image = self.document["images"][name]
            array = make_image(*image["size"], image["seed"])
            expect_equal(crc(array), image["u8_crc"], "checksum of the generated image")
            media = Image.fromarray(array)
        config = {**model.config.to_dict(), "image_aspect_ratio": mode[0] if mode else "pad"}
        return process_images([media], processor, config)[0]

    def vision(self, entry: str, ckpt: str) -> VisionFeatures:
        if (ckpt, entry) not in self.encoded:
            self.encoded[ckpt, entry] = self.model(ckpt)[1].encode_vision([self.pixels(entry, ckpt)])[0]
        return self.encoded[ckpt, entry]

    # --- entries -----------------------------------------------------------------------------------------
    def entries(self) -> Iterator[tuple[str, Any, tuple]]:
        """Yield (id, check, its arguments) of every entry."""
        document = self.document
        for total, wanted in document["frame_indices"].items():
            yield f"index/{total}", expect_equal, (frame_indices(int(total)), wanted, "indices")
        if "frame_indices_all" in document:
            yield "index/all", self.check_all_indices, (document["frame_indices_all"],)
        for name, wanted in document["files"].items():
            yield f"file/{name}", self.check_file, (name, wanted)
        for name, wanted in document["pixels"].items():
            yield f"pixels/{name}", self.check_pixels, (name, wanted)
        for name, wanted in document["towers"].items():
            yield f"tower/{name}", self.check_tower, (name, wanted)
        for wanted in document["prompts"]:
            yield f"prompt/{wanted['id']}", self.check_prompt, (wanted,)
        for wanted in document["cases"]:
            yield f"case/{wanted['id']}", self.check_case, (wanted,)

    def check_all_indices(self, wanted: dict) -> None:
        rows = [frame_indices(total) for total in range(wanted["first"], wanted["last"] + 1)]
        expect_equal(crc(np.array(rows, "<i4")), wanted["crc"], "checksum")

    def check_file(self, name: str, wanted: dict) -> None:
        frames = np.stack([np.asarray(frame) for frame in read_frames(self.folder / name)])
        expect_equal(frame_indices(wanted["n"]), wanted["indices"], "indices")
        expect_equal(list(frames.shape), wanted["shape"], "shape")
        if crc(frames) != wanted["u8_crc"]:  # another release of the decoder
            near = self.tolerance["frames_u8_mean"]
            expect_close(frames.mean((1, 2, 3)), wanted["frame_means"], near, "frame means")
            places, values = zip(*wanted["probe"], strict=True)
            expect(np.abs(frames.ravel()[list(places)] - np.array(values)).mean() < near, "probes differ")

    def check_pixels(self, name: str, wanted: dict) -> None:
        pixels = self.pixels(name, self.first)
        expect_like(pixels, wanted, self.tolerance["pixels"], "pixels")
        if f"pix|{name}" in self.arrays:
            expect_close(
                pixels[..., 8::16, 8::16], self.arrays[f"pix|{name}"], self.tolerance["pixels"], "pix"
            )

    def check_tower(self, name: str, wanted: dict) -> None:
        vision, near = self.vision(name, self.first), self.tolerance["features"]
        row = {"absolute": self.tolerance["row_absolute"], "relative": self.tolerance["row_relative"]}
        expect_like(vision.features, wanted["features"], near, "features")
        mean = vision.attention.mean(1)
        expect_like(mean, wanted["attention_mean"], what="attention", **row)
        projected = self.model(self.first)[1].get_model().mm_projector(vision.features)
        if "projected" in wanted:
            expect_like(projected, wanted["projected"], self.tolerance["features"], "projected")
        if "features_of_reversed_input_reversed_back" in wanted:
            pixels = self.pixels(name, self.first).flip(1)
            back = self.model(self.first)[1].encode_vision([pixels])[0].features.flip(0)
            expect_like(back, wanted["features_of_reversed_input_reversed_back"], near, "reversed features")
        found = {
            "feat": vision.features[:, ::32],
            "proj": projected[:, ::32].detach(),
            "feat_frame3": vision.features[3] if len(vision.features) > 3 else None,
        }
        for key, tensor in found.items():
            if f"{key}|{name}" in self.arrays:
                expect_close(tensor, self.arrays[f"{key}|{name}"], near, key)
        for key, tensor in (("row", mean), ("row_heads_frame3", vision.attention[-1:].squeeze(0))):
            if f"{key}|{name}" in self.arrays:
                tensor = vision.attention[3] if key == "row_heads_frame3" else tensor
                expect_close(tensor, self.arrays[f"{key}|{name}"], what=key, **row)

    def check_prompt(self, wanted: dict) -> None:
        tokenizer, model, _ = self.model(self.first)
        words = wanted["media"].split(",")[0].split(" then ")
        tags = media_tags([word == "video" for word in words if word != "none"], model.config)
        tags = wanted["joiner"].join([DEFAULT_IMAGE_TOKEN] * tags.count(DEFAULT_IMAGE_TOKEN))
        prompt = make_prompt(wanted["conv"], tags, wanted["turns"])
        expect_equal(prompt, wanted["prompt"], "prompt")
        expect_equal(tokenizer_image_token(prompt, tokenizer), wanted["input_ids"], "ids")

    def check_case(self, case: dict) -> None:
        tokenizer, model, _ = self.model(case["ckpt"])
        media = case["media"]
        entries = [
            f"video/{one['video']}" if "video" in one else f"image/{one['image']}/{one['mode']}"
            for one in media
        ]
        clips = [entry.startswith("video/") for entry in entries]
        prompt = make_prompt(case["conv"], media_tags(clips, model.config), [case["question"]])
        expect_equal(prompt, case["prompt"], "prompt")
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
        expect_equal(ids.tolist(), case["input_ids"], "ids")

        method = next((method for part, method in METHODS.items() if part in case["kind"]), None)
        prunes_images = case["kind"].startswith("image")
        pruner, by_image = None, [False] * len(media)
        if method is not None:
            budget = case.get("total", case["budgets"][0])
            pruner = get_pruner(method, tokens=budget, important_ratio=case.get("r", 0.5))
            model.set_pruner(pruner, clip_budget="total" if "total" in case else "frame")
            by_image = [prunes_images or is_clip for is_clip in clips]
        visions = [self.vision(entry, case["ckpt"]) for entry in entries]
        tokens = [
            model.visual_tokens(vision, pruner if prunes else None)
            for vision, prunes in zip(visions, by_image, strict=True)
        ]
        full = case["binding"] == "full"
        if method is not None:
            check_masks([one for one, prunes in zip(tokens, by_image, strict=True) if prunes], case)
        if not full:
            return
        visual = [part for one in tokens for part in one.parts]
        if case["visual_tokens"] is not None:
            expect_equal(sum(map(len, visual)), case["visual_tokens"], "visual tokens")
        limit = ContextLimits.of(model.config).prompt
        embed = model.get_input_embeddings()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="a sequence of .* tokens is longer")
            batch = splice(ids[None], None, None, visual, embed, "right", limit)
            expect_equal(batch.embeds.shape[1], case["seq_len"], "length")
            expect_like(batch.embeds[0], case["embeds"], self.tolerance["embeds"], "embeddings")
            if (key := f"embeds|{case['id']}") in self.arrays:
                near = self.tolerance["embeds"]
                expect_close(batch.embeds[0].detach(), self.arrays[key], near, "embeddings")
            given: dict[str, Any] = {"visual": visual or None}
            if media and (method is None or all(by_image)):  # encoded and pruned by generate itself
                given = {"images": [self.pixels(entry, case["ckpt"]) for entry in entries], "pruner": pruner}
            with torch.no_grad():
                logits = model(ids[None], visual=visual if media else None, use_cache=False).logits[0, -1]
            check_best(logits, case["prefill_top5"], self.tolerance["logits"])
            new = model.generate(
                ids[None], **given, do_sample=False, max_new_tokens=max(8, len(case["new_ids"]))
            )
        expect(int((ids == IMAGE_TOKEN_INDEX).sum()) == len(visual), "tags")
        expect_equal(new[0].tolist(), case["new_ids"], "new ids")


def make_prompt(template: str, tags: str, turns: list[str]) -> str:
    """Return a prompt of questions and answers, with `tags` and a line break before the first."""
    conversation = conv_templates[template].copy()
    for place, text in enumerate(turns):
        text = f"{tags}\n{text}" if tags and not place else text
        conversation.append_message(conversation.roles[place % 2], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def check_masks(tokens: list[Any], case: dict) -> None:
    """Compare which patches of every frame or picture were kept."""
    budgets, masks = case["budgets"], case["masks"]
    sizes = [size for one in tokens for size in (one.lengths or (one.count,))]
    expect_equal(sizes, budgets, "kept per frame")
    patches = 4 * len(masks[0])  # a hex digit is four patches
    kept = torch.cat([one.kept.indices.flatten() for one in tokens]).split(sizes)
    for frame, (mask, indices) in enumerate(zip(masks, kept, strict=True)):
        wanted = np.flatnonzero(unpack_mask(mask, patches))
        expect_equal(len(wanted), budgets[frame], f"frame {frame}: tokens of the reference")
        if case["binding"] == "full" or case["frame_robust"][frame]:
            expect_equal((indices % patches).tolist(), wanted.tolist(), f"frame {frame}: patches")


def check_best(logits: torch.Tensor, wanted: list, near: float) -> None:
    """Compare the five best ids, of which two may swap where their logits are within the tolerance."""
    ids, values = zip(*wanted, strict=True)
    expect_close(logits[list(ids)], values, near, "logits of the best ids")
    best = logits.topk(len(ids)).indices.tolist()
    expect_close(logits[best], values, near, "best logits")
    for found, id_, value in zip(best, ids, values, strict=True):
        same = found == id_ or (found in ids and abs(dict(wanted)[found] - value) <= near)
        expect(same, f"best ids: {best}, expected {list(ids)}")


def run(folder: Path) -> dict[str, object]:
    """Return {"cases", "equal", "failed"} of a folder; print what differs on standard error."""
    failed, count = [], 0
    for identity, check, arguments in Reference(folder).entries():
        count += 1
        try:
            check(*arguments)
        except (Mismatch, KeyError, ValueError, OSError) as error:
            failed.append(identity)
            print(f"{identity}: {type(error).__name__}: {error}", file=sys.stderr)
    return {"cases": count, "equal": count - len(failed), "failed": failed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    found = run(parser.parse_args(argv).folder)
    print(json.dumps(found))
    return 1 if found["failed"] or not found["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())

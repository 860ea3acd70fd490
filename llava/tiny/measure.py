"""Measure what a bundled model says: descriptions, colors and objects in words, plain questions, perplexity.

    python -m llava.tiny.measure --model smol --num-images 100 --output measured.json

Images are drawn from development seeds, which neither training nor a bundled benchmark uses. The model gets
one question at a time, without earlier turns.

* description: "Describe the image in one sentence." Recall is the fraction of the kinds of objects of an
  image that the answer names, averaged over images; precision the fraction of all named kinds that are there.
* color, what: exact match of short answers about shapes and single objects.
* text: plain questions without an image; an answer counts if it contains an accepted word.
* perplexity: of a text written for this purpose, in windows of 512 tokens, without a prompt.

For a LoRA adapter, text and perplexity are also measured of the language model below it. The last line of
standard output is one JSON document; the answers are in the file of --output. POPE is measured by
`llava.eval.sweep` on images of the same seeds (scripts/smol/measure.sh).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava.argtypes import at_least
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.checkpoint.config import conversation_for

from . import world
from .benchmarks.common import mentioned_objects
from .world import conversations, questions
from .world.conversations import WHAT
from .world.scenes import Scene

PROSE = Path(__file__).with_name("prose.txt")
WINDOW = 512  # tokens of the text that are scored at once
LONGEST = 64  # tokens of an answer
# Question, accepted words. None of these prompts is in `chat.prompts`.
PLAIN = (
    ("What is the capital of France?", "paris"),
    ("What is the capital of England?", "london"),
    ("How many days are in a week?", "seven|7"),
    ("What color is grass?", "green"),
    ("What color is the sky on a clear day?", "blue"),
    ("What do cows drink?", "water"),
    ("How many legs does a dog have?", "four|4"),
    ("Which planet do we live on?", "earth"),
    ("What is the opposite of big?", "small|little|tiny"),
    ("What is the first month of the year?", "january"),
    ("What do you use to write on paper?", "pen|pencil|ink"),
    ("What is frozen rain called?", "snow|hail|sleet|ice"),
    ("Which animal says meow?", "cat|cats"),
    ("What is two plus two?", "four|4"),
    ("Name a fruit that is yellow.", "banana|bananas|lemon|lemons|pineapple|mango"),
    ("What is the star at the center of our solar system called?", "sun"),
    ("What language do people speak in Spain?", "spanish"),
    ("In which season does snow usually fall?", "winter"),
    ("What do you call the meal that you eat in the morning?", "breakfast"),
    ("Which sense do we use our ears for?", "hearing|hear|sound"),
)


def description_score(answer: str, scene: Scene) -> tuple[float, int, int]:
    """Score a description: (recall, kinds named that are there, kinds named)."""
    named = mentioned_objects(answer.lower())
    there = {item.name for item in scene.objects if item.kind != "word"}
    return len(named & there) / len(there), len(named & there), len(named)


def exact(answer: str, truth: str) -> bool:
    """Compare short answers without case, a final period and a leading article."""
    return re.sub(r"^(an?|the) ", "", answer.strip().lower().rstrip(".")) == truth.lower()


def accepted(answer: str, words: str) -> bool:
    """Return whether an answer contains one of the words, which are separated by |."""
    return re.search(rf"\b({words})\b", answer.lower()) is not None


def percent(values: Iterable[float]) -> float | None:
    """Return the mean in percent with two decimals, None of nothing."""
    values = list(values)
    return round(100 * sum(values) / len(values), 2) if values else None


class Talker:
    """A loaded model that answers single questions greedily."""

    def __init__(
        self, tokenizer: Any, model: Any, processor: Any = None, template: str = "vicuna_v1"
    ) -> None:
        self.tokenizer, self.model, self.processor, self.template = tokenizer, model, processor, template

    @classmethod
    def load(cls, name: str, **options: Any) -> Talker:
        """Load a checkpoint by name or folder; `options` are of `load_pretrained_model`."""
        from llava.model.builder import load_pretrained_model

        tokenizer, model, processor, _ = load_pretrained_model(name, **options)
        template = conversation_for(model.config.to_dict(), Path(name).name)
        return cls(tokenizer, model, processor, template)

    @classmethod
    def language_model(cls, folder: Path, template: str, dtype: torch.dtype) -> Talker:
        """Load a language model without vision, as a reference."""
        from transformers import AutoModelForCausalLM

        from llava.model.tokenizer import load_tokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return cls(load_tokenizer(folder), model, None, template)

    def _prompt(self, question: str) -> list[int]:
        conv = conv_templates[self.template].copy()
        conv.append_message(conv.roles[0], question)
        conv.append_message(conv.roles[1], None)
        return tokenizer_image_token(conv.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX)

    @torch.inference_mode()
    def ask(self, asked: Sequence[str], longest: int) -> list[str]:
        """Answer questions without an image, each alone, in at most `longest` tokens."""
        prompts = [torch.tensor(self._prompt(question)) for question in asked]
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids, mask = torch.full((len(prompts), width), pad), torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, True
        device = self.model.device
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=longest,
            pad_token_id=pad,
        )
        new = out if self.processor else out[:, width:]  # transformers returns the prompts as well
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def ask_about(self, image: Image.Image, asked: Sequence[str], longest: int) -> list[str]:
        """Answer questions about an image, each alone; the image is encoded and prefilled once."""
        from llava.model.decode import Decoding, Row, generate_shared

        pixels = process_images([image], self.processor, self.model.config)
        visual = self.model.visual_tokens(self.model.encode_vision(pixels, [image.size])[0])
        rows = [
            Row(
                tuple(self._prompt(f"{DEFAULT_IMAGE_TOKEN}\n{question}")),
                visual.embeds,
                0,
                places=visual.places,
                span=visual.span,
            )
            for question in asked
        ]
        found = generate_shared(self.model, self.tokenizer, rows, Decoding(longest), self.model.pruner)
        return [self.tokenizer.decode(ids or [], skip_special_tokens=True).strip() for ids in found]

    @torch.inference_mode()
    def perplexity(self, text: str) -> float:
        """Return the perplexity of a text per token, in windows of `WINDOW` tokens that do not overlap."""
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        total, count = 0.0, 0
        for window in ids.to(self.model.device).split(WINDOW, dim=1):
            logits = self.model(input_ids=window).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
        if not math.isfinite(total):
            raise ValueError("perplexity: the model gives NaN or infinite logits. Use another checkpoint.")
        return math.exp(total / count)


def about_images(talker: Talker, count: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask about `count` images from `seed` on; return scores, and rows of what was asked and answered."""
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    recalls, right, named = [], 0, 0
    for number in tqdm(range(seed, seed + count), desc="asking", unit="image"):
        image, scene = world.draw(number)
        rs = np.random.RandomState([93, number & 0xFFFFFFFF, number >> 32])
        asked = [
            {"kind": kind, "seed": number, "question": pair[0], "truth": pair[1]}
            for kind, makers in (("color", (questions.color,)), ("what", WHAT))
            for maker in makers
            if (pair := maker(scene, rs))
        ]
        if any(item.kind != "word" for item in scene.objects):
            truth = conversations.enumeration(conversations.phrases(scene))
            one = {"kind": "description", "question": conversations.DESCRIBE[0], "truth": truth}
            asked.append({**one, "seed": number})
        for row, answer in zip(
            asked, talker.ask_about(image, [row["question"] for row in asked], LONGEST), strict=True
        ):
            row["answer"] = answer
            if row["kind"] == "description":
                recall, hits, said = description_score(answer, scene)
                recalls.append(recall)
                right, named = right + hits, named + said
            else:
                row["right"] = exact(answer, row["truth"])
        rows += asked
    scores: dict[str, Any] = {
        "description": {
            "images": len(recalls),
            "recall": percent(recalls),
            "precision": round(100 * right / named, 2) if named else None,
            "half_named": percent(recall >= 0.5 for recall in recalls),
        }
    }
    for kind in ("color", "what"):
        found = [row["right"] for row in rows if row["kind"] == kind]
        scores[kind] = {"questions": len(found), "exact": percent(found)}
    return scores, rows


def about_text(talker: Talker) -> tuple[int, float, list[dict[str, Any]]]:
    """Return how many plain questions are answered, the perplexity of the text, and rows as above."""
    answers = talker.ask([question for question, _ in PLAIN], LONGEST)
    rows = [
        {"kind": "text", "question": question, "truth": words, "answer": answer}
        | {"right": accepted(answer, words)}
        for (question, words), answer in zip(PLAIN, answers, strict=True)
    ]
    perplexity = talker.perplexity(PROSE.read_text(encoding="utf-8"))
    return sum(row["right"] for row in rows), perplexity, rows


def _base_of(name: str) -> Path | None:
    """Return the language model below a LoRA or projector folder, None for a complete checkpoint."""
    from llava.model.checkpoint.find import resolve_checkpoint
    from llava.model.checkpoint.folder import CheckpointFolder

    return CheckpointFolder(resolve_checkpoint(name)).base


def measure(
    name: str, count: int, seed: int, say: Callable[[str], None] = print, **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure a checkpoint; see the module.

    Args:
        name: Its name or folder.
        count: Images.
        seed: Of the first image.
        say: Reports progress.
        options: Of `load_pretrained_model`.

    Returns:
        The document, and all questions with their answers.
    """
    base = _base_of(name)
    talker = Talker.load(name, **options)
    scores, rows = about_images(talker, count, seed)
    talkers = {"model": talker}
    if base is not None:
        dtype = next(talker.model.parameters()).dtype
        talkers["base"] = Talker.language_model(base, talker.template, dtype)
    scores |= {"text": {"questions": len(PLAIN)}, "perplexity": {}}
    for place, one in talkers.items():
        say(f"plain questions and perplexity of the {place}")
        answered, perplexity, asked = about_text(one)
        scores["text"][place], scores["perplexity"][place] = answered, round(perplexity, 3)
        rows += [{"of": place, **row} for row in asked]
    if base is not None:
        found = scores["perplexity"]
        found["ratio"] = round(found["model"] / found["base"], 4)
    document = {"model": name, "seed": seed, "images": count, "conv_mode": talker.template, **scores}
    return document, rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smol", help="checkpoint folder or name (default: %(default)s)")
    parser.add_argument(
        "--num-images", type=at_least(1), default=100, help="images to ask about (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=at_least(world.DEVELOPMENT),
        default=world.DEVELOPMENT,
        help="seed of the first image (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=at_least(0), help="visual tokens to keep (default: all)")
    parser.add_argument("--method", help="pruning method with --tokens (default: vispruner)")
    parser.add_argument("--output", type=Path, help="JSON file of all answers (default: none)")
    args = parser.parse_args(argv)
    if args.method and args.tokens is None:
        parser.error("--method: --tokens is missing. Give the number of visual tokens to keep.")
    pruning = {"method": "none"}
    if args.tokens is not None:
        pruning = {"method": args.method or "vispruner", "visual_token_num": args.tokens}
    try:
        document, rows = measure(
            args.model, args.num_images, args.seed, lambda text: print(text, file=sys.stderr), **pruning
        )
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**document, "answers": rows}, indent=1, ensure_ascii=False)
            args.output.write_text(text + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({**document, **pruning}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

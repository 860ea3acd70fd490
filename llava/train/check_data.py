"""Read a data set for training without a model, and print what it contains.

    python -m llava.train.check_data --data_path mix.json --image_folder images \\
        --version v1 --model_name_or_path vicuna-7b-v1.5

Prints samples, turns, lengths, image sizes, the masks of three samples with their answers marked, and all
samples that cannot be used. Every image is decoded. The last line is one JSON document; the exit code is 1 if
a sample cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.model.checkpoint.find import resolve_checkpoint
from llava.train.data import open_image, silence_length_warning, tokenize
from llava.train.preprocess import BadSample, training_template, training_tokenizer
from llava.train.samples import SampleFile, counted

_SHOWN = 10  # bad samples printed per kind
_MASKS = 3
_PERCENTILES = (0, 25, 50, 75, 90, 99, 100)


class SampleFacts(NamedTuple):
    """What was found out about one sample."""

    index: int
    turns: int = 0
    tokens: int = 0  # with visual ones
    answer_tokens: int = 0
    size: tuple[int, int] | None = None
    starts_with_answer: bool = False  # which is dropped, as in LLaVA
    bad: BadSample | None = None


class _Reader(Dataset):
    """Reads the facts of good samples."""

    def __init__(
        self,
        samples: SampleFile,
        good: Sequence[int],
        tokenizer: Any,
        template: Conversation,
        image_tokens: int,
    ) -> None:
        self.samples, self.good, self.tokenizer = samples, good, tokenizer
        self.template, self.image_tokens = template, image_tokens

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, place: int) -> SampleFacts:
        index = self.good[place]
        sample = self.samples[index]
        turns = sample["conversations"]
        facts = SampleFacts(index, len(turns), starts_with_answer=turns[0]["from"] == "gpt")
        try:
            if "image" in sample and self.samples.image_folder is not None:
                facts = facts._replace(size=open_image(self.samples.image_path(sample["image"])).size)
            if self.tokenizer is not None:
                ids, labels = tokenize(sample, self.tokenizer, self.template, image_tokens=self.image_tokens)
                visual = max(self.image_tokens - 1, 0) * int((ids == IMAGE_TOKEN_INDEX).sum())
                answers = int((labels != IGNORE_INDEX).sum())
                facts = facts._replace(tokens=len(ids) + visual, answer_tokens=answers)
        except BadSample as error:
            facts = facts._replace(bad=error)
        return facts


def read_facts(
    samples: SampleFile,
    tokenizer: Any,
    template: Conversation,
    image_tokens: int,
    workers: int = 0,
    quiet: bool = False,
) -> list[SampleFacts]:
    """Read all samples that the check of the file found good.

    Args:
        tokenizer: None leaves the tokens out.
        image_tokens: visual tokens of an image.
        workers: processes that read.
    """
    good = [index for index in range(len(samples)) if index not in samples.bad]
    reader = _Reader(samples, good, tokenizer, template, image_tokens)
    batches = DataLoader(reader, batch_size=64, collate_fn=list, num_workers=workers)
    facts: list[SampleFacts] = []
    with tqdm(total=len(good), desc="reading samples", unit="sample", disable=quiet, file=sys.stderr) as bar:
        for batch in batches:
            facts += batch
            bar.update(len(batch))
    return facts


def summarize(
    samples: SampleFile, facts: list[SampleFacts], limit: int, counts_tokens: bool
) -> dict[str, Any]:
    """Return the last line's document."""
    bad = dict(samples.bad) | {one.index: one.bad for one in facts if one.bad is not None}
    good = [one for one in facts if one.bad is None]
    images = sum(samples.has_image)
    document: dict[str, Any] = {
        "data_path": samples.path,
        "samples": len(samples),
        "with_image": images,
        "without_image": len(samples) - images - sum(not samples.has_image[i] for i in samples.bad),
        "turns": percentiles([one.turns for one in good]),
        "first_answers_dropped": sum(one.starts_with_answer for one in good),
    }
    if counts_tokens:
        lengths = [one.tokens for one in good]
        document |= {
            "tokens": percentiles(lengths),
            "answer_tokens": sum(one.answer_tokens for one in good),
            "model_max_length": limit,
            "longer": sum(length > limit for length in lengths),
        }
    sizes = [one.size for one in good if one.size is not None]
    if sizes:
        document["image_sizes"] = {
            "width": percentiles([width for width, _ in sizes]),
            "height": percentiles([height for _, height in sizes]),
            "most_common": [[*size, count] for size, count in Counter(sizes).most_common(5)],
        }
    kinds: dict[str, list[int]] = {}
    for index in sorted(bad):
        kinds.setdefault(bad[index].kind, []).append(index)
    document["bad"] = len(bad)
    document["bad_samples"] = kinds
    return document


def percentiles(values: Sequence[int]) -> dict[str, float] | None:
    """Return percentiles by name ("p50"), None without values."""
    if not values:
        return None
    found = np.percentile(values, _PERCENTILES)
    return {f"p{name}": round(float(value), 1) for name, value in zip(_PERCENTILES, found, strict=True)}


def marked_text(ids: Sequence[int], labels: Sequence[int], tokenizer: Any, colored: bool) -> str:
    """Return the text of a sample with its targets marked: green, or between [[ and ]]."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colored else ("[[", "]]")
    text, run, is_target = "", [], False

    def flush() -> str:
        if not run:
            return ""
        shown = decode(run, tokenizer)
        return f"{begin}{shown}{end}" if is_target else shown

    for token, label in zip(ids, labels, strict=True):
        if run and (label != IGNORE_INDEX) != is_target:
            text, run = text + flush(), []
        is_target = label != IGNORE_INDEX
        run.append(token)
    return text + flush()


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of ids, with `<image>` for an image."""
    text, run = "", []
    for token in [*ids, IMAGE_TOKEN_INDEX]:
        if token != IMAGE_TOKEN_INDEX:
            run.append(token)
            continue
        if run:
            # sentencepiece drops the space at the start of a text
            space = " " if tokenizer.convert_ids_to_tokens([run[0]])[0].startswith("▁") else ""
            text += space + tokenizer.decode(run, skip_special_tokens=False).removeprefix(space)
        text, run = text + DEFAULT_IMAGE_TOKEN, []
    return text.removesuffix(DEFAULT_IMAGE_TOKEN)


def print_report(
    samples: SampleFile, document: dict[str, Any], bad: dict[int, BadSample], limit: int
) -> None:
    """Print the document for people, with the bad samples by kind."""
    print(f"{samples.path}: {document['samples']} samples", end="")
    print(f" ({document['with_image']} with an image, {document['without_image']} without)")
    rows = [("turns", document["turns"])]
    if document.get("tokens"):
        rows.append(("tokens", document["tokens"]))
    for side, values in document.get("image_sizes", {}).items():
        if side != "most_common":
            rows.append((f"image {side}", values))
    print(f"{'percentile':14}" + "".join(f"{name:>9}" for name in _PERCENTILES))
    for name, values in rows:
        if values:
            print(f"{name:14}" + "".join(f"{value:9g}" for value in values.values()))
    if document["first_answers_dropped"]:
        print(f"{document['first_answers_dropped']} samples start with an answer, which is dropped")
    if "longer" in document:
        print(f"{document['longer']} samples are longer than {limit} tokens and are cut")
        print(f"{document['answer_tokens']} tokens are answers")
    if "image_sizes" in document:
        common = [f"{w} x {h} ({n})" for w, h, n in document["image_sizes"]["most_common"]]
        print(f"most common image sizes: {', '.join(common)}")
    if not bad:
        print("no bad samples")
        return
    kinds = Counter(error.kind for error in bad.values())
    print(f"{len(bad)} samples cannot be used: {counted(kinds)}")
    for kind, indices in document["bad_samples"].items():
        print(f"{kind}:")
        for index in indices[:_SHOWN]:
            print(f"  {samples.name(index)}: {bad[index]}.")
        if len(indices) > _SHOWN:
            print(f"  ... and {len(indices) - _SHOWN} more")


def print_masks(
    samples: SampleFile, good: Sequence[int], tokenizer: Any, template: Conversation, colored: bool
) -> None:
    """Print three samples as the model is trained on them: one with an image and one without if possible."""
    with_image = [index for index in good if samples.has_image[index]][:_MASKS]
    without = [index for index in good if not samples.has_image[index]][:_MASKS]
    chosen = sorted((with_image[:1] + without[:1] + with_image[1:] + without[1:])[:_MASKS])
    mark = "green" if colored else "between [[ and ]]"
    for index in chosen:
        ids, labels = tokenize(samples[index], tokenizer, template)
        print(f"\n{samples.name(index)}, targets {mark}:")
        print(marked_text(ids.tolist(), labels.tolist(), tokenizer, colored))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.train.check_data", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--data_path", required=True, help="LLaVA's JSON, or one sample per line")
    parser.add_argument("--image_folder", help="folder of the images (default: images are not read)")
    parser.add_argument("--version", default="v1", help="conversation template, as in training (default: v1)")
    parser.add_argument(
        "--model_name_or_path", help="folder or Hub name with the tokenizer (default: no tokens, no masks)"
    )
    parser.add_argument(
        "--model_max_length", type=positive, default=2048, metavar="N",
        help="longest sequence in tokens, visual ones included (default: 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--image_tokens", type=positive, default=576, metavar="N",
        help="visual tokens of an image (default: 576, as in LLaVA-1.5)",
    )  # fmt: skip
    parser.add_argument(
        "--dataloader_num_workers", type=int, default=0, metavar="N",
        help="processes that read; 0 reads in this one (default: 0)",
    )  # fmt: skip
    return parser


def positive(text: str) -> int:
    """Parse an integer above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def check(args: argparse.Namespace) -> int:
    """Read, print and return the exit code."""
    if args.image_folder is not None and not os.path.isdir(args.image_folder):
        raise FileNotFoundError(f"--image_folder {args.image_folder}: no such folder.")
    template, tokenizer = training_template(args.version), None
    if args.model_name_or_path is not None:
        folder = resolve_checkpoint(args.model_name_or_path)
        tokenizer = training_tokenizer(folder, args.model_max_length)
        silence_length_warning(tokenizer)
    samples = SampleFile(args.data_path, template, args.image_folder)
    facts = read_facts(samples, tokenizer, template, args.image_tokens, args.dataloader_num_workers)
    document = summarize(samples, facts, args.model_max_length, tokenizer is not None)
    bad = dict(samples.bad) | {one.index: one.bad for one in facts if one.bad is not None}
    print_report(samples, document, bad, args.model_max_length)
    if args.image_folder is None and document["with_image"]:
        print("images were not read: set --image_folder")
    if tokenizer is None:
        print("tokens were not counted: set --model_name_or_path")
    else:
        colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        good = [one.index for one in facts if one.bad is None]
        print_masks(samples, good, tokenizer, template, colored)
    print(json.dumps(document))
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return check(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

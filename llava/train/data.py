"""LLaVA's data set for training: samples read lazily, images processed on the fly, batches padded.

    data = make_supervised_data_module(tokenizer, arguments, model)
    data["train_dataset"][0]["input_ids"]

A sample that cannot be used stops the training or is replaced by the next good one (`bad_samples`), so that
all processes and a resumed run see the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation
from llava.mm_utils import is_anyres, load_image, process_images, read_pinpoints
from llava.train.preprocess import BadSample, is_padding, preprocess, preprocess_multimodal, training_template
from llava.train.samples import SampleError, SampleFile


class LazySupervisedDataset(Dataset):
    """Samples of a data file as ids, labels and pixels.

    An item has input_ids (L,) int64 with -200 for the image, labels (L,) int64, and `index` in the data file.
    With `is_multimodal` also image, (3, H, W) or (crops, 3, H, W) float32, image_size (width, height) and
    image_path; a sample without an image has a black one, and None for its path. An image that `is_cached`
    finds is not decoded: image and image_size are None.

    Args:
        data_path: JSON list or JSON lines, or the file that was already checked.
        tokenizer: its `model_max_length` limits the ids of samples without an image.
        image_processor: of the vision tower.
        conversation: template of the training.
        image_folder: folder that the names of images are relative to.
        image_aspect_ratio: square, pad, anyres or anyres_max_N.
        model_config: config with `image_grid_pinpoints`, for anyres.
        mm_use_im_start_end: put `<im_start>` and `<im_end>` around the image.
        is_multimodal: whether items have an image.
        bad_samples: "stop" raises for a sample that cannot be used, "skip" takes the next good one.
        image_tokens: visual tokens of an image, to find samples whose answers are all cut (default: 0).

    Attributes:
        samples: the data file.
        found: (samples,) uint8, 1 where one turned out bad while it was loaded; shared with workers.
        is_cached: path -> whether the features of an image are stored, so that its pixels are not needed.

    Raises:
        SampleError: the file or, with "stop", a sample cannot be used.
        ValueError: an invalid argument.
    """

    def __init__(
        self,
        data_path: str | SampleFile,
        tokenizer: Any,
        image_processor: Any = None,
        *,
        conversation: Conversation,
        image_folder: str | None = None,
        image_aspect_ratio: str = "square",
        model_config: Any = None,
        mm_use_im_start_end: bool = False,
        is_multimodal: bool = False,
        bad_samples: str = "stop",
        image_tokens: int = 0,
    ) -> None:
        if bad_samples not in ("stop", "skip"):
            raise ValueError(f"--bad_samples: {bad_samples!r} is unknown. Choose stop or skip.")
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: has no pad token. Set tokenizer.pad_token, e.g. to its unk_token.")
        if is_multimodal and image_processor is None:
            raise ValueError("image_processor: is missing. Set --vision_tower.")
        self.image_config = {
            "image_aspect_ratio": image_aspect_ratio,
            "image_grid_pinpoints": getattr(model_config, "image_grid_pinpoints", None),
            "anyres_protocol": getattr(model_config, "anyres_protocol", None),
        }
        if is_anyres(image_aspect_ratio) and is_multimodal:
            side = int(image_processor.crop_size["height"])
            read_pinpoints(self.image_config["image_grid_pinpoints"], side)
        elif image_aspect_ratio not in ("square", "pad") and not is_anyres(image_aspect_ratio):
            raise ValueError(
                f"--image_aspect_ratio: {image_aspect_ratio!r} is unknown. Choose square, pad or anyres."
            )
        if not isinstance(data_path, SampleFile):
            data_path = SampleFile(data_path, conversation, image_folder)
        self.samples, self.tokenizer, self.image_processor = data_path, tokenizer, image_processor
        self.conversation, self.image_folder = conversation, self.samples.image_folder
        self.mm_use_im_start_end, self.is_multimodal = mm_use_im_start_end, is_multimodal
        self.is_cached: Callable[[str], bool] | None = None
        self.skips, self.image_tokens = bad_samples == "skip", image_tokens
        silence_length_warning(tokenizer)
        self.samples.require(self.skips, is_multimodal)
        self._replaced = self._replacements()
        self.found = torch.zeros(len(self.samples), dtype=torch.uint8).share_memory_()

    def _replacements(self) -> dict[int, int]:
        """Return the next good sample of each that the check of the file found bad."""
        found, bad = {}, self.samples.bad
        good = next(index for index in range(len(self)) if index not in bad)
        for index in sorted(bad, reverse=True):
            found[index] = found.get(index + 1, index + 1) if index + 1 < len(self) else good
        return found

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """Words per sample, plus 128 with an image, as LLaVA counts them."""
        places = (self._replaced.get(index, index) for index in range(len(self)))
        return [self.samples.words[place] + 128 * self.samples.has_image[place] for place in places]

    @property
    def modality_lengths(self) -> list[int]:
        """Words per sample, negative without an image."""
        places = (self._replaced.get(index, index) for index in range(len(self)))
        return [
            self.samples.words[place] if self.samples.has_image[place] else -self.samples.words[place]
            for place in places
        ]

    @property
    def bad(self) -> dict[int, BadSample]:
        """All samples found bad so far, also by workers, by index."""
        found = dict(self.samples.bad)
        for index in self.found.nonzero().flatten().tolist():
            try:
                self._load(index)
            except BadSample as error:
                found[index] = error
        return found

    def __getitem__(self, index: int) -> dict[str, Any]:
        for place in self._candidates(range(len(self))[index]):
            try:
                return self._load(place)
            except BadSample as error:
                if not self.skips:
                    raise SampleError(
                        f"{self.samples.name(place)}: {error}. Fix it, or leave it out by --bad_samples skip."
                    ) from error
                self.found[place] = 1
        raise SampleError(f"{self.samples.path}: no sample can be used. {self.samples.describe(self.bad)}")

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield a sample and what replaces it: the next ones of its modality, then those of the other."""
        samples, first = self.samples, self._replaced.get(index, index)
        for same in (True, False):
            for place in (*range(first, len(self)), *range(first)):
                if place not in samples.bad and not self.found[place]:
                    if (samples.has_image[place] == samples.has_image[first]) == same:
                        yield place

    def _load(self, index: int) -> dict[str, Any]:
        """Return an item; raise `BadSample`."""
        sample, item = self.samples[index], {}
        if "image" in sample:
            path = self.samples.image_path(sample["image"])
            stored = self.is_cached is not None and self.is_cached(path)
            left_out = {"image": None, "image_size": None, "image_path": path}
            item = left_out if stored else self.load_image(path)
        elif self.is_multimodal:
            height, width = (int(self.image_processor.crop_size[side]) for side in ("height", "width"))
            item = {"image": torch.zeros(3, height, width), "image_size": (width, height), "image_path": None}
        input_ids, labels = tokenize(
            sample, self.tokenizer, self.conversation, self.mm_use_im_start_end, self.image_tokens
        )
        return {"input_ids": input_ids, "labels": labels, **item, "index": index}

    def load_image(self, path: str) -> dict[str, Any]:
        """Return `image`, `image_size` and `image_path` of a file. Raises `BadSample`."""
        image = open_image(path)
        pixels = process_images([image], self.image_processor, self.image_config)[0]
        return {"image": pixels, "image_size": image.size, "image_path": path}


def open_image(path: str) -> Image.Image:
    """Open an image as RGB; raise `BadSample` if it is missing or broken."""
    try:
        return load_image(path)
    except FileNotFoundError as error:
        raise BadSample("missing image", str(error).rstrip(".")) from error
    except ValueError as error:
        raise BadSample("broken image", str(error).rstrip(".")) from error


def tokenize(
    sample: dict[str, Any],
    tokenizer: Any,
    template: Conversation,
    mm_use_im_start_end: bool = False,
    image_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and labels of a sample.

    Args:
        image_tokens: visual tokens of an image, to find samples whose answers are all cut.

    Raises:
        BadSample: the tokens of its turns do not add up, or no answer is left within `model_max_length`.
    """
    turns, has_image = sample["conversations"], "image" in sample
    if has_image:
        turns = preprocess_multimodal(turns, template, mm_use_im_start_end)
    input_ids, labels, mismatch = preprocess(turns, tokenizer, template, has_image)
    if mismatch is not None:
        raise BadSample(
            "mismatch",
            f"tokenization mismatch: the turns have {mismatch[0]} tokens, the conversation {mismatch[1]}. "
            "Remove special tokens and separators of the template from the turns",
        )
    places = (labels != IGNORE_INDEX).nonzero()
    # The image is in front of the first answer.
    first = int(places[0]) + max(image_tokens - 1, 0) * has_image if len(places) else len(labels)
    if first >= tokenizer.model_max_length or not len(places):
        raise BadSample(
            "too long",
            f"no answer begins within {tokenizer.model_max_length} tokens. Shorten the question or raise "
            "--model_max_length",
        )
    return input_ids, labels


def silence_length_warning(tokenizer: Any) -> None:
    """Stop transformers' warning of long ids: the collator and the splice cut them."""
    known = getattr(tokenizer, "deprecation_warnings", {})
    known["sequence-length-is-longer-than-the-specified-maximum"] = True


@dataclass
class DataCollatorForSupervisedDataset:
    """Pad items on the right to a batch.

    The batch has input_ids and labels (B, L), attention_mask (B, L) bool, and if the items have images:
    images (B, ...) if all have one shape, else a list, with image_sizes and image_paths as lists. Ids beyond
    the tokenizer's `model_max_length` are cut.
    """

    tokenizer: Any

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        longest = max(len(one["input_ids"]) for one in instances)
        limit = min(self.tokenizer.model_max_length, longest)

        def padded(name: str, value: int) -> torch.Tensor:
            rows = [one[name] for one in instances]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)[:, :limit]

        input_ids = padded("input_ids", pad)
        rows = [~is_padding(one["input_ids"], self.tokenizer) for one in instances]
        padded_mask = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=False)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": padded("labels", IGNORE_INDEX),
            "attention_mask": padded_mask[:, :limit],
        }
        if "image" in instances[0]:
            images = [one["image"] for one in instances]
            same = all(one is not None and one.shape == images[0].shape for one in images)
            batch["images"] = torch.stack(images) if same else images
            for name in ("image_size", "image_path"):
                if name in instances[0]:
                    batch[f"{name}s"] = [one[name] for one in instances]
        return batch


def read_samples(arguments: Any) -> SampleFile:
    """Check the data file of a training, before a model is loaded.

    Args:
        arguments: (model, data, training) arguments of `llava.train.arguments`.

    Raises:
        SampleError: the file cannot be used, or has bad samples that are not to be skipped.
    """
    model_args, data_args, training_args = arguments
    samples = SampleFile(
        data_args.data_path,
        training_template(model_args.version),
        data_args.image_folder,
        quiet=not training_args.should_log,
    )
    samples.require(data_args.bad_samples == "skip", bool(model_args.vision_tower))
    return samples


def make_supervised_data_module(
    tokenizer: Any, arguments: Any, model: Any = None, samples: SampleFile | None = None
) -> dict[str, Any]:
    """Return `train_dataset`, `eval_dataset` (None) and `data_collator` for a trainer.

    Args:
        arguments: (model, data, training) arguments of `llava.train.arguments`.
        model: the LLaVA model, whose tower has the image processor; None for text only.
        samples: the data file, if it was already checked.
    """
    model_args, data_args, _ = arguments
    template = training_template(model_args.version)
    tower = model.get_vision_tower() if model is not None and data_args.is_multimodal else None
    dataset = LazySupervisedDataset(
        samples or read_samples(arguments),
        tokenizer,
        None if tower is None else tower.image_processor,
        conversation=template,
        image_aspect_ratio=data_args.image_aspect_ratio,
        model_config=getattr(model, "config", None),
        mm_use_im_start_end=model_args.mm_use_im_start_end,
        is_multimodal=data_args.is_multimodal,
        bad_samples=data_args.bad_samples,
        image_tokens=0
        if tower is None or is_anyres(data_args.image_aspect_ratio)
        else _fewest(model_args, tower),
    )
    return {
        "train_dataset": dataset,
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


def _fewest(model_args: Any, tower: Any) -> int:
    """Return the fewest visual tokens that an image can have: of the smallest budget."""
    budgets = [int(one) for one in str(model_args.visual_token_num).split(",") if one.strip().isdigit()]
    return min([tower.num_patches, *budgets])

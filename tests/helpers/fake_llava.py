"""A LLaVA that costs nothing: counts what is asked of it and answers from what it sees.

Its answer to a prompt depends on the prompt's ids and the image's kept tokens only, so a correct engine gives
the same answers however questions are ordered, batched or interrupted.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch

from llava.pruning import Kept


class FakeTokenizer:
    """Bytes as ids, 3 above their value; 0 pads, 1 begins, 2 ends."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    padding_side = "left"

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, *(byte + 3 for byte in text.encode())])

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token - 3 for token in ids if token > 2).decode("utf-8", "replace")


class FakeProcessor:
    """Pixels are the image resized to 4 x 4."""

    image_mean = (0.5, 0.5, 0.5)
    crop_size = {"height": 4, "width": 4}
    size = {"shortest_edge": 4}

    def preprocess(self, image: Any, **_: Any) -> dict[str, torch.Tensor]:
        small = image.resize((4, 4))
        pixels = torch.tensor(list(small.tobytes()), dtype=torch.float32).reshape(4, 4, 3).permute(2, 0, 1)
        return {"pixel_values": pixels[None]}


class FakeLlava:
    """The part of the model's interface that the engine uses, with counters."""

    device = torch.device("cpu")

    def __init__(self, out_of_memory_above: int | None = None) -> None:
        self.config = SimpleNamespace(image_aspect_ratio="pad", mm_use_im_start_end=False)
        self.generation_config = SimpleNamespace(eos_token_id=2)
        self.encoded: Counter = Counter()
        self.pruned: Counter = Counter()
        self.batches: list[int] = []
        self.out_of_memory_above = out_of_memory_above

    def encode_vision(self, images: Any, image_sizes: Any) -> list[Any]:
        found = []
        for pixels in images:
            key = float(pixels.double().sum())
            self.encoded[key] += 1
            found.append(SimpleNamespace(features=pixels.flatten(1).T[None], key=key))
        return found

    def visual_tokens(self, vision: Any, pruner: Any) -> Any:
        self.pruned[vision.key, pruner] += 1
        count = 16 if pruner.tokens is None else min(16, pruner.tokens)
        embeds = vision.features[0, :count]
        indices = torch.arange(count)[None]
        return SimpleNamespace(embeds=embeds, kept=Kept(indices, indices < 0), count=count)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, visual: Any = None, **settings: Any
    ) -> torch.Tensor:
        self.batches.append(len(input_ids))
        if self.out_of_memory_above is not None and len(input_ids) > self.out_of_memory_above:
            raise torch.OutOfMemoryError("the fake device is full")
        images, rows = iter(visual or []), []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            ids = ids[mask.bool()]
            assert int(mask[-1]) == 1, "batches are padded on the left"
            seen = next(images).sum() if (ids == -200).any() else torch.tensor(0.0)
            value = int(seen) + int((ids * torch.arange(1, len(ids) + 1)).sum())
            rows.append(["no", "Yes", "maybe"][value % 3] + f" {value}")
        assert next(images, None) is None, "as many visual as <image>"
        ids = [[*(byte + 3 for byte in row.encode()), 2] for row in rows]
        width = max(map(len, ids))
        return torch.tensor([row + [0] * (width - len(row)) for row in ids])

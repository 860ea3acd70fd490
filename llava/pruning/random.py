"""Random tokens, as a baseline: T of N uniformly without replacement, another draw for every image.

The draw depends on the seed, the crop's identity and N alone: not on the order of work, the batch, the
machine or the version of torch. Smaller budgets are subsets of larger ones, so curves over budgets have less
noise.
"""

from __future__ import annotations

import hashlib
import struct

import torch

from .base import Pruner
from .registry import register_pruner


@register_pruner("random")
class Random(Pruner):
    """Keep uniformly random tokens, seeded per row by `seed` and the crop's identity.

    Without `crop_ids` a row is identified by its attention values: the same image gets the same draw again,
    and two rows with equal attention get one draw.
    """

    uses_seed = True

    def score(self, features, cues):
        rows, n = features.shape[:2]
        crop_ids = cues.crop_ids
        if crop_ids is None:
            values = cues.attention.to("cpu", torch.float64).contiguous().numpy()
            crop_ids = [hashlib.sha256(row.tobytes()).hexdigest() for row in values]
        scores = [_random_scores(self.seed, crop_id, n) for crop_id in crop_ids]
        return torch.tensor(scores, dtype=torch.int64, device=features.device).view(rows, n)


def _random_scores(seed: int, crop_id: str | int, n: int) -> list[int]:
    """Draw n 64-bit integers from a SHAKE-256 stream, which is the same on every machine."""
    stream = hashlib.shake_256(f"{seed}/{crop_id}".encode()).digest(8 * n)
    # The smallest words are kept first, so they become the greatest signed integers.
    return [2**63 - 1 - word for word in struct.unpack(f"<{n}Q", stream)]

"""Random tokens, as a baseline: T of N uniformly without replacement, drawn anew for every image.

The draw depends on (seed, key of the row) and N alone: not on the order of work, the batch, the machine or
the version of torch. Smaller budgets are subsets of larger ones, so redraws do not blur a curve over budgets.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Kept, Pruner
from .registry import register_pruner


@register_pruner("random")
class Random(Pruner):
    """Uniformly random tokens, seeded per row by `seed` and the row's key.

    Without keys a row is known by its attention values, so the same picture gets the same draw again, and two
    rows with equal attention share one.
    """

    uses_seed = True

    def choose(
        self, features: Tensor, attention: Tensor, tokens: int, keys: Sequence[str | int] | None = None
    ) -> Kept:
        rows, n = features.shape[:2]
        if keys is None:
            values = attention.to("cpu", torch.float64).contiguous().numpy()
            keys = [hashlib.sha256(row.tobytes()).hexdigest() for row in values]
        picks = [_shuffled(self.seed, key, n)[:tokens] for key in keys]
        picks = torch.tensor(picks, dtype=torch.int64).view(rows, min(tokens, n))
        return Kept.from_picks(picks.to(features.device), 0)


def _shuffled(seed: int, key: str | int, n: int) -> list[int]:
    """0..n-1 in random order: sorted by 64 bits each from a SHAKE-256 stream, the same everywhere."""
    stream = hashlib.shake_256(f"{seed}/{key}".encode()).digest(8 * n)
    words = struct.unpack(f"<{n}Q", stream)
    return sorted(range(n), key=words.__getitem__)

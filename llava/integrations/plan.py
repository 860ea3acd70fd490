"""What is known of a pruned model and of a shortened prompt: settings, kept places, tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llava.integrations.budget import HostBudget
from llava.integrations.hosts.base import Host
from llava.model.inside import acts_inside
from llava.pruning import Pruner, get_pruner


@dataclass
class KeptRow:
    """What was kept of one row: an image, crop, tile or frame.

    Attributes:
        sample: Row of the batch.
        modality: "image" or "video".
        total: Tokens of the row, N.
        kept: (K,) int64 as in `llava.pruning.base.Kept.indices`: places in the row.
        important: (K,) bool, selected by attention.
        frame: (i, f) of the i-th of f frames of a clip, None for an image.
        grid: (rows, columns) of the N tokens, None if unknown.
        places: (N,) int64, the place of each token in the caller's prompt; -1 for none.
        budget: Tokens to keep, None for all.
    """

    sample: int
    modality: str
    total: int
    kept: Tensor
    important: Tensor
    frame: tuple[int, int] | None
    grid: tuple[int, int] | None
    places: Tensor
    budget: int | None


@dataclass
class Plan:
    """Which places of the caller's prompt were kept.

    After a method that prunes inside the language model, `sel`, `valid` and `rows` are what its last layer
    sees. Tokens that the method makes of others have no place and are in none of them.

    Attributes:
        sel: (B, S') int64, places in the caller's sequence.
        valid: (B, S') bool, False on padding.
        rows: What was kept of every image, crop, tile or frame, in the order of their placeholders.
        length: S, the caller's length.
        layers: Of a method that prunes inside the language model: for every row of the batch, and every
            layer, the places of visual tokens that it sees, (K,) int64, ascending; else empty.
    """

    sel: Tensor
    valid: Tensor
    rows: list[KeptRow]
    length: int
    layers: list[list[Tensor]] = field(default_factory=list)


@dataclass
class Shortened:
    """A prompt whose visual tokens were pruned, as the language model gets it.

    Attributes:
        embeds: (B, S', D).
        mask: The attention mask (B, S'); the caller's own if nothing was dropped, which may be None.
        positions: (B, S'), or (4, B, S') of text, time, row and column; None where the model derives them.
        ids: (B, S') int64, None if the caller passed embeddings.
        others: Further tensors of the prompt: labels, token types.
        visual: Modality -> (B, S') bool, placeholders.
        deepstack: Arguments of the language model for its first layers; empty for most hosts.
        plan: Which places were kept.
    """

    embeds: Tensor
    mask: Tensor | None
    positions: Tensor | None
    ids: Tensor | None
    others: dict[str, Tensor]
    visual: dict[str, Tensor]
    deepstack: dict[str, Any]
    plan: Plan


@dataclass
class Pruning:
    """Settings of a pruned model, and what its last call kept.

    Attributes:
        method: Name of the method.
        budget: `tokens`, `keep` and `clip_tokens`.
        important_ratio: Share of kept tokens that is selected by attention.
        positions: "contiguous" or "original"; "original" on hosts whose positions have rows and columns; the
            method's own where it prunes inside the language model.
        last: The plan of the last call with pixels, None before.
    """

    method: str
    budget: HostBudget
    important_ratio: float
    positions: str
    host: Host
    last: Plan | None = None

    def config(self) -> dict[str, object]:
        """Return the settings, ready for JSON."""
        settings = {"method": self.method, **vars(self.budget), "important_ratio": self.important_ratio}
        return {**settings, "positions": self.positions}

    @property
    def acts_inside(self) -> bool:
        """Whether the method prunes inside the language model."""
        return acts_inside(self.pruner(1))

    def pruner(self, tokens: int | None) -> Pruner:
        """Return the method with the budget of one row."""
        return get_pruner(self.method, tokens=tokens, important_ratio=self.important_ratio)

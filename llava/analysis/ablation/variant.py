"""VisPruner with one of its choices changed, for ablations; with the defaults it is VisPruner itself.

Not registered as a method: it exists for comparisons, and its name says what was changed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llava.pruning.base import CUES, Cues, Kept, descending, mean_attention, parse_cue
from llava.pruning.diversity import DROP_PER_ROUND, most_diverse
from llava.pruning.random import Random
from llava.pruning.vispruner import VisPruner

_CHOICES = {
    "similarity": ("features", "projected", "keys"),
    "order": ("cue", "raster", "random"),
    "budget": ("crop", "image"),
    "positions": (None, "contiguous", "original"),
}
_SCORES = ("attention", "received")  # cues of `CUES` with a score per patch


@dataclass(frozen=True)
class VisPrunerVariant(VisPruner):
    """Keep floor(T * r) tokens by a cue and T - floor(T * r) by diversity, as VisPruner does.

    Args:
        cue: What importance is: "attention" (of [CLS]) or "received" of `llava.pruning.base.CUES`, also of
            another layer ("attention@3/12"), "norm" (L2 norm of the feature), or "random".
        similarity: Features that are compared: of the tower, "projected", or "keys" of the select layer.
        drop: Tokens to drop per round; "all" drops as many as the split of a round allows.
        order: Order of the residual list, which decides the even/odd splits: by the cue, "raster", "random".
        budget: "crop" keeps T tokens of every crop, "image" the same number in total, chosen among the
            tokens of all crops.
        positions: Position ids of kept tokens: "contiguous", "original" (those of the unpruned prompt), or
            None for what the model is set to.
    Raises:
        ValueError: for an unknown word.
    """

    cue: str = "attention"
    similarity: str = "features"
    drop: int | str = DROP_PER_ROUND
    order: str = "cue"
    budget: str = "crop"
    positions: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in _CHOICES.items():
            if getattr(self, option) not in known:
                listed = ", ".join(map(str, known))
                raise ValueError(f"{option}: {getattr(self, option)!r} is unknown. Choose from {listed}.")
        if self._kind in _SCORES:
            parse_cue(self.cue, 1)  # refuses another form of the layer
        elif self.cue not in ("norm", "random"):
            raise ValueError(
                f"cue: {self.cue!r} is unknown. Choose from {', '.join(_SCORES)} (also of a layer, "
                "attention@3/12), norm, random."
            )
        if self.drop != "all" and not (type(self.drop) is int and self.drop > 0):
            raise ValueError(f"drop: expected an integer >= 1 or 'all', got {self.drop!r}.")
        if self.budget == "image" and (self.similarity == "keys" or self._kind != self.cue):
            raise ValueError(
                "budget: 'image' joins the crops, which keys and cues of other layers do not support. Use "
                "another cue or similarity, or budget='crop'."
            )

    @property
    def _kind(self) -> str:
        return self.cue.partition("@")[0]

    @property
    def changed(self) -> dict[str, object]:
        """The options that are not those of VisPruner."""
        own = {f.name for f in fields(self)} - {f.name for f in fields(VisPruner)}
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in own and getattr(self, f.name) != f.default
        }

    @property
    def name(self) -> str:
        """The name in answer files and folders: "vispruner", with what was changed."""
        parts = [f"{option}={value}" for option, value in self.changed.items()]
        return "-".join(["vispruner", *parts]).replace("/", "of")

    @property
    def cues(self) -> tuple[str, ...]:
        """What is read besides features and [CLS] attention of the select layer."""
        read = [self.cue] if self._kind in CUES and self.cue != "attention" else []
        return (*read, *([self.similarity] if self.similarity != "features" else []))

    @property
    def per_image(self) -> bool:
        """Whether all crops of an image are one row, with one budget."""
        return self.budget == "image"

    @property
    def uses_seed(self) -> bool:
        """Whether anything is drawn."""
        return "random" in (self.cue, self.order)

    def config(self) -> dict[str, object]:
        """Return the settings that affect the result; `method` says what was changed."""
        shown = {f.name for f in fields(VisPruner)} | {"method"}
        return {key: value for key, value in super().config().items() if key in shown}

    def choose(self, features: Tensor, cues: Cues, tokens: int) -> Kept:
        order = descending(self._scores(self.cue, features, cues))  # (B, N)
        n_important = int(tokens * self.important_ratio)
        important, residual = order[:, :n_important], order[:, n_important:]
        if self.order == "raster":
            residual = residual.sort(dim=1).values
        elif self.order == "random":
            rank = self._scores("random", features, cues).gather(1, residual)
            residual = residual.gather(1, descending(rank))
        drop = features.shape[1] if self.drop == "all" else int(self.drop)
        diverse = most_diverse(self._compared(features, cues), residual, tokens - n_important, drop)
        return Kept.from_selected(torch.cat([important, diverse], dim=1), n_important)

    def _scores(self, cue: str, features: Tensor, cues: Cues) -> Tensor:
        """Return the importance of every patch: (B, N) float64, or int64 of random numbers."""
        if cue == "random":
            return Random(seed=self.seed).score(features, cues)
        if cue == "norm":
            return features.to(torch.float64).norm(dim=-1)
        found = cues[cue]
        return mean_attention(found) if self._kind == "attention" else found.to(torch.float64)

    def _compared(self, features: Tensor, cues: Cues) -> Tensor:
        """Return the features whose cosines are compared: (B, N, C)."""
        if self.similarity == "features":
            return features
        found = cues[self.similarity]
        return found[:, 1:] if self.similarity == "keys" else found  # keys: [CLS] first

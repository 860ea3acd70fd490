"""The base of all pruning methods: settings, checks of inputs and results, and top-k selection.

    @register_pruner("norm")
    class LargestNorm(Pruner):
        def score(self, features, attention, crop_ids, question):
            return features.double().norm(dim=-1)

A method defines `score`; a method that is not a top-k of scores defines `choose` instead. Independent of how
features and attention are computed, and of how the indices are used.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from . import kernels

CropIds = Sequence[str | int] | None
_doubts: ContextVar[list[Tensor] | None] = ContextVar("doubts", default=None)  # a list within keep_deferred


@dataclass(frozen=True)
class Kept:
    """The kept tokens, K = min(T, N) in every row."""

    indices: Tensor  # (B, K) int64, ascending in each row: raster order
    important: Tensor  # (B, K) bool: True for tokens that were selected by [CLS] attention

    @classmethod
    def from_selected(cls, selected: Tensor, n_important: int) -> Kept:
        """Sort `selected` (B, K) int64 into raster order; its first `n_important` columns are important."""
        indices, rank = selected.sort(dim=1)
        return cls(indices, rank < n_important)


@dataclass(frozen=True)
class TextCue:
    """The question about an image, for methods whose selection depends on it."""

    text: str  # the question in the benchmark's words, without the conversation around it
    embeds: Tensor | None  # (L, D) input embeddings of that text in the language model; None if not available

    def cpu(self) -> TextCue:
        """Return the cue with its embeddings on the CPU."""
        return TextCue(self.text, None if self.embeds is None else self.embeds.cpu())


@dataclass(frozen=True)
class Pruner:
    """A pruning method with its settings; equal settings compare equal and have equal hashes.

    Args:
        tokens: Visual tokens to keep per row (a row is one crop); None keeps all.
        important_ratio: Share of tokens to keep for their attention; used only if `uses_ratio`.
        seed: Seed of random methods; used only if `uses_seed`.
    Raises:
        ValueError: for settings of the wrong type or range.
    """

    tokens: int | None = None
    important_ratio: float = 0.5
    seed: int = 0

    name: ClassVar[str] = ""  # set by register_pruner
    needs_question: ClassVar[bool] = False  # True: the selection is not shared by the questions of one image
    scores_attention: ClassVar[bool] = False  # True: `score` is [CLS] attention, so kept tokens are important
    uses_ratio: ClassVar[bool] = False
    uses_seed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _integer("tokens", self.tokens))
            if self.tokens < 0:
                raise ValueError(f"tokens must be 0 or more (or None to keep all), got {self.tokens}")
        object.__setattr__(self, "seed", _integer("seed", self.seed))
        try:
            ratio = float(operator.pos(self.important_ratio))  # pos: numbers pass, strings do not
        except (TypeError, ValueError):
            raise ValueError(f"important_ratio must be a number, got {self.important_ratio!r}") from None
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"important_ratio must be in [0, 1], got {ratio}")
        object.__setattr__(self, "important_ratio", ratio)

    @torch.no_grad()
    def keep(
        self, features: Tensor, attention: Tensor, crop_ids: CropIds = None, question: TextCue | None = None
    ) -> Kept:
        """Select the tokens of every row; rows never influence each other.

        On a device without float64 (see `has_float64`) the selection runs on the CPU, and so it is the same
        everywhere; the result is on the device of the inputs.

        Args:
            features: (B, N, C) floating point, patch features of the select layer, input of the projector.
            attention: (B, H, N) floating point, attention of [CLS] to the patches per head, same layer.
            crop_ids: One identity per row, for random methods; ignored by the others.
            question: The question about all rows; passed on only to methods with `needs_question`.
        Raises:
            ValueError: for wrong shapes, dtypes or devices, for NaN or infinite values, and for a method that
                needs a question and gets none.
        """
        _check(features, attention, crop_ids)
        device = features.device
        if not has_float64(device.type):
            question = None if question is None else question.cpu()
            kept = self.keep(features.cpu(), attention.cpu(), crop_ids, question)
            return Kept(kept.indices.to(device), kept.important.to(device))
        _check_values(features, attention)
        return self._choose(features, attention, crop_ids, question)

    @torch.no_grad()
    def keep_deferred(
        self, features: Tensor, attention: Tensor, crop_ids: CropIds = None, question: TextCue | None = None
    ) -> tuple[Kept, Tensor]:
        """Select like `keep`, but without a device sync, so that a CUDA graph can capture it.

        The checks of values and the search for tokens that need special care become one flag on the device.
        A method that reads values or `crop_ids` on the host, such as "random", cannot be captured.
        Without float64 on the device, the selection is that of `keep`, with its syncs.

        Returns:
            The kept tokens, and `doubt`, 0-dim bool on the device. If it is True, the indices are valid but
            may be wrong: the values are not finite, or a row has tokens that are equal, nearly equal, of zero
            norm or of a norm out of range. Then call `keep`. Otherwise the tokens are those of `keep`.
        Raises:
            ValueError: for wrong shapes, dtypes or devices, and for a method that needs a question and gets
                none.
        """
        _check(features, attention, crop_ids)
        if not has_float64(features.device.type):
            kept = self.keep(features, attention, crop_ids, question)
            return kept, torch.zeros((), dtype=torch.bool, device=features.device)
        doubts = [~_all_finite(features, attention)]
        token = _doubts.set(doubts)
        try:
            kept = self._choose(features, attention, crop_ids, question)
        finally:
            _doubts.reset(token)
        return kept, functools.reduce(torch.logical_or, [rows.any() for rows in doubts])

    def _choose(
        self, features: Tensor, attention: Tensor, crop_ids: CropIds, question: TextCue | None
    ) -> Kept:
        """Call `choose` and check its result."""
        if self.needs_question and question is None:
            raise ValueError(
                f"question: {self.name!r} chooses by the question, got None. "
                "Pass question=TextCue(text, embeds), or run it through llava.eval, which does."
            )
        rows, n = features.shape[:2]
        budget = n if self.tokens is None else self.tokens
        kept = self.choose(features, attention, budget, crop_ids, question if self.needs_question else None)
        expected = (rows, min(budget, n))
        if kept.indices.shape != expected or kept.important.shape != expected:
            raise RuntimeError(
                f"pruner {self.name!r} returned {tuple(kept.indices.shape)} indices and "
                f"{tuple(kept.important.shape)} flags, expected {expected}"
            )
        return kept

    def select(
        self, features: Tensor, attention: Tensor, crop_ids: CropIds = None, question: TextCue | None = None
    ) -> Tensor:
        """Return `keep(...).indices`: (B, min(T, N)) int64, ascending."""
        return self.keep(features, attention, crop_ids, question).indices

    def choose(
        self, features: Tensor, attention: Tensor, tokens: int, crop_ids: CropIds, question: TextCue | None
    ) -> Kept:
        """Keep the min(tokens, N) patches of the greatest score per row; ties go to the lower patch index.

        Inputs have been checked. `tokens` may exceed N.
        """
        order = descending(self.score(features, attention, crop_ids, question))
        return Kept.from_selected(order[:, :tokens], tokens if self.scores_attention else 0)

    def score(
        self, features: Tensor, attention: Tensor, crop_ids: CropIds, question: TextCue | None
    ) -> Tensor:
        """Return a score per patch (B, N); the patches of the greatest scores are kept."""
        raise TypeError(f"{type(self).__name__} must define score or choose")

    def config(self) -> dict[str, object]:
        """Return the settings that affect the result, ready for JSON."""
        used = {"important_ratio": self.uses_ratio, "seed": self.uses_seed}
        settings = {f.name: getattr(self, f.name) for f in fields(self) if used.get(f.name, True)}
        return {"method": self.name, **settings}


@functools.cache
def has_float64(device_type: str) -> bool:
    """Return whether devices of a type ("cpu", "cuda", "mps" ...) compute in float64.

    Apple's MPS and some NPUs do not: they raise, or compute in float32 without a word.
    """
    if device_type in ("cpu", "cuda", "meta"):
        return True
    try:
        ones = torch.ones(2, 2, dtype=torch.float64, device=device_type)
        return (ones @ ones + 2.0**-40).sum().item() == 8 + 2.0**-38
    except (RuntimeError, TypeError):
        return False


def deferring() -> bool:
    """Return whether the code runs within `Pruner.keep_deferred`, and so must not sync with the device."""
    return _doubts.get() is not None


def defer(rows: Tensor) -> bool:
    """Report rows that need special care, (B,) bool; True if the caller can leave them to a call of `keep`.

    False outside of `Pruner.keep_deferred`: then the caller has to treat the rows itself.
    """
    doubts = _doubts.get()
    if doubts is None:
        return False
    doubts.append(rows)
    return True


def descending(score: Tensor) -> Tensor:
    """Order the patches by descending score, ties to the lower index: (B, N) -> (B, N) int64."""
    if score.dtype == torch.float64:
        return kernels.run("attention.descending", _descending, score)
    return _descending(score)


def _descending(score: Tensor) -> Tensor:
    return score.argsort(dim=1, descending=True, stable=True)


def mean_attention(attention: Tensor) -> Tensor:
    """Average [CLS] attention over the heads: (B, H, N) -> (B, N) float64.

    The heads are added one after the other: a library's reduction may add the heads of one column in another
    order than those of the next, and equal columns would then differ in a bit instead of tying.
    """
    return kernels.run("attention.mean_attention", _mean_attention, attention)


def _mean_attention(attention: Tensor) -> Tensor:
    heads = attention.shape[1]
    wide = attention.to(torch.float64)
    mean = wide[:, 0].clone()
    for head in range(1, heads):
        mean += wide[:, head]
    # A Python number would be a multiplication by 1 / heads on some devices; new_tensor copies from the host.
    return mean.div_(torch.full((), heads, dtype=mean.dtype, device=mean.device))


def attention_order(attention: Tensor) -> Tensor:
    """Order the patches by descending mean [CLS] attention, ties to the lower index: (B, H, N) -> (B, N)."""
    return descending(mean_attention(attention))


def _integer(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _check(features: Tensor, attention: Tensor, crop_ids: CropIds) -> None:
    for name, tensor, shape in (("features", features, "(B, N, C)"), ("attention", attention, "(B, H, N)")):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 3 or tensor.shape[1 if name == "attention" else 2] == 0:
            raise ValueError(f"{name} must be {shape} with H, C > 0, got shape {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if features.shape[0] != attention.shape[0] or features.shape[1] != attention.shape[2]:
        raise ValueError(
            f"features (B, N, C) and attention (B, H, N) disagree on B or N: "
            f"got {tuple(features.shape)} and {tuple(attention.shape)}"
        )
    if features.device != attention.device:
        raise ValueError(f"features are on {features.device}, attention is on {attention.device}")
    if crop_ids is not None and (isinstance(crop_ids, str) or len(crop_ids) != features.shape[0]):
        raise ValueError(
            f"crop_ids must have one identity per row: expected {features.shape[0]}, got {crop_ids!r}"
        )


def _all_finite(features: Tensor, attention: Tensor) -> Tensor:
    """Return whether all values are finite, 0-dim bool on the device; False as well if their sum overflows.

    One float64 sum is finite only if every term is, and costs a tenth of testing every element.
    """
    return torch.isfinite(features.sum(dtype=torch.float64) + attention.sum(dtype=torch.float64))


def _check_values(features: Tensor, attention: Tensor) -> None:
    if _all_finite(features, attention):
        return
    for name, tensor in (("features", features), ("attention", attention)):
        rows = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero().flatten().tolist()
        if rows:  # empty: every value is finite, but the sum overflowed
            raise ValueError(f"{name} {tuple(tensor.shape)} contain NaN or infinite values in rows {rows}")

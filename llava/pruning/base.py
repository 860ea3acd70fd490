"""The base of all pruning methods: settings, checks of inputs and results, and top-k selection.

    @register_pruner("norm")
    class LargestNorm(Pruner):
        def score(self, features, cues):
            return features.double().norm(dim=-1)

A method defines `score`; a method that is not a top-k of scores defines `choose` instead. What it reads
besides the features is declared in `cues` (see `CUES`). Independent of how features and cues are computed,
and of how the result is used.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from . import kernels

CropIds = Sequence[str | int] | None
_doubts: ContextVar[list[Tensor] | None] = ContextVar("doubts", default=None)  # a list within keep_deferred

# What a method can read besides features and [CLS] attention; only cues that a method declares are computed.
# "NAME@L" is the cue of layer L of the tower (1 is the first), "NAME@L/D" of layer L of a tower of D layers,
# scaled to the tower's depth (see `scaled_layer`); without "@" it is that of the select layer.
CUES = {
    "attention": "(B, H, N) attention of [CLS] to the patches per head",
    "received": "(B, N) attention to each patch, mean over heads and all N + 1 queries",
    "features": "(B, N, C) patch features of another layer",
    "keys": "(B, N + 1, d) key projections with bias, unscaled, mean over heads; [CLS] first",
    "cls": "(B, C) feature of [CLS]",
    "last_query": "(B, W) query projection of [CLS] in the tower's last layer, heads side by side",
    "last_keys": "(B, N + 1, W) key projections of the tower's last layer, heads side by side; [CLS] first",
    "projected": "(B, N, D) features after the projector",
    "image_embeds": "(B, N, E) features in the space that CLIP compares with texts",
    "text_embeds": "(M, E) the question's parts in that space",
    "merged": "(B, L, C) features of a tower whose layers merge N patches to L, the number after @",
    "merged_groups": "(B, N) int64, the column of `merged` that each patch is part of",
}
# Places of kept tokens that are not patches, in `Kept.indices`
CLS_PLACE, NO_PLACE, NO_TOKEN = -1, -2, -3


@dataclass(frozen=True)
class Kept:
    """The kept tokens of every row: patches, or features that were merged from patches.

    Without `features`, the tokens are the patches `indices`, ascending (raster order), K = min(T, N). With
    `features`, the columns are in the order in which the language model gets them.
    """

    # (B, K) int64: the patch, or for merged tokens the patch where the token stands, CLS_PLACE, NO_PLACE (it
    # stands for the whole image), or NO_TOKEN (the row has fewer tokens)
    indices: Tensor
    important: Tensor  # (B, K) bool: True for tokens that were selected by [CLS] attention
    features: Tensor | None = None  # (B, K, C) input of the projector
    groups: Tensor | None = (
        None  # (B, N) int64: the column that a patch was merged into, -1 if it was dropped
    )

    def to(self, device: torch.device) -> Kept:
        """Return the same on another device."""
        return self._each(lambda one: one.to(device))

    def __getitem__(self, rows: slice) -> Kept:
        """Return some of the rows."""
        return self._each(lambda one: one[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Kept:
        return Kept(**{name: change(one) for name, one in vars(self).items() if one is not None})

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
    bare: str | None = None  # the question without instructions about the answer; None: as `text`

    def cpu(self) -> TextCue:
        """Return the cue with its embeddings on the CPU."""
        return TextCue(self.text, None if self.embeds is None else self.embeds.cpu(), self.bare)


@dataclass(frozen=True)
class Cues(Mapping[str, Tensor]):
    """What a method reads besides the features of the select layer: the cues that it declares.

    `cues["attention"]` is always there.
    """

    tensors: Mapping[str, Tensor]
    crop_ids: CropIds = None  # one identity per row, for random methods
    question: TextCue | None = None  # None unless the method sets `needs_question`

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def attention(self) -> Tensor:
        """(B, H, N) attention of [CLS] to the patches per head, in the select layer."""
        return self.tensors["attention"]


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
    cues: ClassVar[tuple[str, ...]] = ()  # names of `CUES` that the method reads besides "attention"
    positions: ClassVar[str | None] = None  # "original", "contiguous"; None: as the model is set
    acts_in: ClassVar[str] = "image"  # or "decoder": prunes inside the language model (see `inside`)
    per_image: ClassVar[bool] = False  # True: all crops of an image are one row, with one budget
    needs_question: ClassVar[bool] = False  # True: the selection is not shared by the questions of one image
    reads_values: ClassVar[bool] = False  # True: the method decides on the host, so no CUDA graph captures it
    scores_attention: ClassVar[bool] = False  # True: `score` is [CLS] attention, so kept tokens are important
    merges: ClassVar[bool] = False  # True: kept tokens are features merged from patches
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
        self,
        features: Tensor,
        attention: Tensor,
        crop_ids: CropIds = None,
        question: TextCue | None = None,
        cues: Mapping[str, Tensor] | None = None,
    ) -> Kept:
        """Select the tokens of every row; rows never influence each other.

        On a device without float64 (see `has_float64`) the selection runs on the CPU, and so it is the same
        everywhere; the result is on the device of the inputs.

        Args:
            features: (B, N, C) floating point, patch features of the select layer, input of the projector.
            attention: (B, H, N) floating point, attention of [CLS] to the patches per head, same layer.
            crop_ids: One identity per row, for random methods; ignored by the others.
            question: The question about all rows; passed on only to methods with `needs_question`.
            cues: The tensors that the method declares in its own `cues`; others are ignored.
        Raises:
            ValueError: for wrong shapes, dtypes or devices, for NaN or infinite values, for a missing cue,
                and for a method that needs a question and gets none.
        """
        given = self._given(features, attention, crop_ids, question, cues)
        device = features.device
        if not has_float64(device.type):
            moved = {name: cue.cpu() for name, cue in given.tensors.items()}
            question = None if given.question is None else given.question.cpu()
            return self.keep(features.cpu(), moved["attention"], crop_ids, question, moved).to(device)
        _check_values({"features": features, **given.tensors})
        return self._choose(features, given)

    @torch.no_grad()
    def keep_deferred(
        self,
        features: Tensor,
        attention: Tensor,
        crop_ids: CropIds = None,
        question: TextCue | None = None,
        cues: Mapping[str, Tensor] | None = None,
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
        given = self._given(features, attention, crop_ids, question, cues)
        if not has_float64(features.device.type):
            kept = self.keep(features, attention, crop_ids, question, cues)
            return kept, torch.zeros((), dtype=torch.bool, device=features.device)
        doubts = [~_all_finite([features, *given.tensors.values()])]
        token = _doubts.set(doubts)
        try:
            kept = self._choose(features, given)
        finally:
            _doubts.reset(token)
        return kept, functools.reduce(torch.logical_or, [rows.any() for rows in doubts])

    def _given(
        self,
        features: Tensor,
        attention: Tensor,
        crop_ids: CropIds,
        question: TextCue | None,
        cues: Mapping[str, Tensor] | None,
    ) -> Cues:
        """Check shapes and devices, and return the cues that the method declares."""
        _check(features, attention, crop_ids)
        if self.needs_question and question is None:
            raise ValueError(
                f"question: {self.name!r} chooses by the question, got None. "
                "Pass question=TextCue(text, embeds), or run it through llava.eval, which does."
            )
        missing = [name for name in self.cues if name not in (cues or {}) and name != "attention"]
        if missing:
            raise ValueError(
                f"cues: {missing[0]!r} is missing, which {self.name!r} reads. "
                f"Pass cues={{{missing[0]!r}: tensor}}, or run it through a model, which computes them."
            )
        tensors = {name: (cues or {})[name] for name in self.cues if name != "attention"}
        for name, cue in tensors.items():
            if cue.device != features.device:
                raise ValueError(f"features are on {features.device}, cue {name!r} is on {cue.device}")
            if name != "text_embeds" and len(cue) != len(features):
                raise ValueError(f"cue {name!r}: expected {len(features)} rows, got shape {tuple(cue.shape)}")
        return Cues({"attention": attention, **tensors}, crop_ids, question if self.needs_question else None)

    def _choose(self, features: Tensor, cues: Cues) -> Kept:
        """Call `choose` and check its result. All or no tokens are the same for every method."""
        rows, n = features.shape[:2]
        budget = n if self.tokens is None else self.tokens
        if budget == 0 or (budget >= n and not self.keeps_ratio and not self.is_adaptive):
            indices = torch.arange(min(budget, n), device=features.device).repeat(rows, 1)
            return Kept(indices, torch.zeros_like(indices, dtype=torch.bool))
        kept = self.choose(features, cues, budget)
        most = min(budget, n)
        shape = kept.indices.shape
        # An adaptive method may add one token that stands for all others.
        fits = shape == (rows, most) or (self.is_adaptive and shape[0] == rows and shape[1] <= n + 1)
        if not fits or kept.important.shape != shape:
            raise RuntimeError(
                f"pruner {self.name!r} returned {tuple(shape)} indices and "
                f"{tuple(kept.important.shape)} flags, expected {(rows, most)}"
            )
        return kept

    @property
    def keeps_ratio(self) -> bool:
        """Whether some tokens are selected by attention, which is told even if all tokens are kept."""
        return self.uses_ratio or self.scores_attention

    @property
    def is_adaptive(self) -> bool:
        """Whether the method chooses its own number of tokens, which differs between rows."""
        return False

    def select(
        self,
        features: Tensor,
        attention: Tensor,
        crop_ids: CropIds = None,
        question: TextCue | None = None,
        cues: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return `keep(...).indices`: (B, min(T, N)) int64, ascending unless tokens are merged."""
        return self.keep(features, attention, crop_ids, question, cues).indices

    def choose(self, features: Tensor, cues: Cues, tokens: int) -> Kept:
        """Keep the min(tokens, N) patches of the greatest score per row; ties go to the lower patch index.

        Inputs have been checked. `tokens` is at least 1; it may exceed N only if `keeps_ratio`.
        """
        order = descending(self.score(features, cues))
        return Kept.from_selected(order[:, :tokens], tokens if self.scores_attention else 0)

    def score(self, features: Tensor, cues: Cues) -> Tensor:
        """Return a score per patch (B, N); the patches of the greatest scores are kept."""
        raise TypeError(f"{type(self).__name__} must define score or choose")

    def flops(self, patches: int, channels: int, projected: int) -> float:
        """Return FLOPs of the selection of one row, without cues; 0 if they are negligible.

        Args:
            patches: N.
            channels: C, of the features.
            projected: D, of the features after the projector.
        """
        return 0.0

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


def scaled_layer(layer: int, of: int, depth: int) -> int:
    """Scale a layer number that was published for `of` layers to a model of `depth` layers.

    The number of layers up to there, in proportion, rounded to the nearest (a half up), at least 1: 2 of 32
    is 1 of 3, and 9 of 24 is 5 of 12. Layers count from 1.
    """
    return min(depth, max(1, int(layer * depth / of + 0.5)))


def parse_cue(cue: str, depth: int) -> tuple[str, int | None]:
    """Split "NAME@L" or "NAME@L/D" into its name and the number for a tower of `depth` layers; None without.

    Raises:
        ValueError: for a name that `CUES` does not list, or another form.
    """
    found = re.fullmatch(r"([a-z_]+)(?:@(\d+)(?:/(\d+))?)?", cue)
    if found is None or found[1] not in CUES:
        raise ValueError(f"cue {cue!r} is unknown. Choose from {', '.join(CUES)}, with @LAYER if needed.")
    if found[2] is None:
        return found[1], None
    number = int(found[2])
    return found[1], number if found[3] is None else scaled_layer(number, int(found[3]), depth)


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


def _all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether all values are finite, 0-dim bool on the device; False as well if their sum overflows.

    One float64 sum is finite only if every term is, and costs a tenth of testing every element.
    """
    sums = [tensor.sum(dtype=torch.float64) for tensor in tensors if tensor.is_floating_point()]
    return torch.isfinite(functools.reduce(operator.add, sums))


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    if _all_finite(tensors.values()):
        return
    for name, tensor in tensors.items():
        rows = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero().flatten().tolist()
        if rows:  # empty: every value is finite, but the sum overflowed
            raise ValueError(f"{name} {tuple(tensor.shape)} contain NaN or infinite values in rows {rows}")

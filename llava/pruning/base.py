"""What every pruner is: frozen settings, checked inputs, and `Kept`, the answer.

A method subclasses `Pruner` and writes `choose`; `keep` around it checks the arguments and the answer, so no
method has to. Does not know how features and attention came about, nor what becomes of the indices.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The tokens that stay, K = min(T, N) of them in every row."""

    indices: Tensor  # (B, K) int64, ascending in each row: raster order
    important: Tensor  # (B, K) bool: True where the rank in [CLS] attention is why the token stays

    @classmethod
    def from_picks(cls, picks: Tensor, n_important: int) -> Kept:
        """`picks` (B, K) int64 in any order; the first `n_important` columns are the important ones."""
        indices, place = picks.sort(dim=1)
        return cls(indices, place < n_important)


@dataclass(frozen=True)
class Asked:
    """What was asked, for methods whose choice depends on it."""

    text: str  # the question as the benchmark words it, without the conversation around it
    embeds: Tensor | None  # (L, D) the language model's input embeddings of that text; None where not at hand


@dataclass(frozen=True)
class Pruner:
    """A pruning method with its settings; equal settings compare equal and hash alike.

    tokens: visual tokens to keep per row (a row is one crop); None keeps all.
    important_ratio, seed: used only where `uses_ratio` / `uses_seed` say so.
    """

    tokens: int | None = None
    important_ratio: float = 0.5
    seed: int = 0

    name: ClassVar[str] = ""  # set by register_pruner
    needs_question: ClassVar[bool] = False  # True: the choice may not be shared by the questions of one image
    uses_ratio: ClassVar[bool] = False
    uses_seed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokens is not None:
            tokens = _integer("tokens", self.tokens)
            if tokens < 0:
                raise ValueError(f"tokens must be 0 or more (or None to keep all), got {tokens}")
            object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "seed", _integer("seed", self.seed))
        try:
            ratio = float(operator.pos(self.important_ratio))  # pos: numbers pass, strings do not
        except (TypeError, ValueError):
            raise ValueError(f"important_ratio must be a number, got {self.important_ratio!r}") from None
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"important_ratio must lie in [0, 1], got {ratio}")
        object.__setattr__(self, "important_ratio", ratio)

    @torch.no_grad()
    def keep(
        self,
        features: Tensor,
        attention: Tensor,
        keys: Sequence[str | int] | None = None,
        question: Asked | None = None,
    ) -> Kept:
        """Choose the tokens of every row; rows never influence each other.

        features: (B, N, C) floating, patch features of the select layer, the ones the projector will read.
        attention: (B, H, N) floating, per-head attention of [CLS] over the patches in that same layer.
        keys: one identity per row, for methods that draw at random; ignored by the others.
        question: what all rows are asked about; only methods with `needs_question` get to see it.
        Raises ValueError on wrong shapes, dtypes or devices, on NaN or infinite values, and for a method that
        needs a question and gets none.
        """
        _check(features, attention, keys)
        rows, n = features.shape[:2]
        budget = n if self.tokens is None else self.tokens
        if not self.needs_question:
            kept = self.choose(features, attention, budget, keys)
        elif question is None:
            raise ValueError(
                f"pruner {self.name!r} chooses by the question: pass question=Asked(text, "
                "embeds), or ask through llava.eval, which does"
            )
        else:
            kept = self.choose(features, attention, budget, keys, question)  # type: ignore[call-arg]
        expected = (rows, n if self.tokens is None else min(self.tokens, n))
        if kept.indices.shape != expected or kept.important.shape != expected:
            raise RuntimeError(
                f"pruner {self.name!r} returned {tuple(kept.indices.shape)} indices and "
                f"{tuple(kept.important.shape)} flags, expected {expected}"
            )
        return kept

    def select(
        self,
        features: Tensor,
        attention: Tensor,
        keys: Sequence[str | int] | None = None,
        question: Asked | None = None,
    ) -> Tensor:
        """`keep(...).indices`: (B, min(T, N)) int64, ascending."""
        return self.keep(features, attention, keys, question).indices

    def choose(
        self, features: Tensor, attention: Tensor, tokens: int, keys: Sequence[str | int] | None
    ) -> Kept:
        """The method itself, on checked inputs: keep min(tokens, N) per row. `tokens` may exceed N.

        With `needs_question` it takes a fifth argument, `question`, an `Asked`.
        """
        raise TypeError(f"{type(self).__name__} must define choose(features, attention, tokens, keys)")

    def config(self) -> dict[str, object]:
        """The settings that matter for the result, ready for JSON."""
        unused = {"important_ratio"} - ({"important_ratio"} if self.uses_ratio else set())
        unused |= set() if self.uses_seed else {"seed"}
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in unused}
        return {"method": self.name, **settings}


def attention_order(attention: Tensor) -> Tensor:
    """Patches by falling head-mean [CLS] attention, ties to the lower index: (B, H, N) -> (B, N) int64.

    In float64, and heads are added one after the other: a library's reduction may add the heads of one column
    in another order than those of the next, and equal columns would then differ in a bit instead of tying.
    """
    heads = attention.shape[1]
    wide = attention.to(torch.float64)
    mean = wide[:, 0].clone()
    for head in range(1, heads):
        mean += wide[:, head]
    mean /= mean.new_tensor(heads)  # a Python number would be a multiplication by 1 / heads on some devices
    return mean.argsort(dim=1, descending=True, stable=True)


def _integer(what: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{what} must be an integer, got {value!r}") from None


def _check(features: Tensor, attention: Tensor, keys: Sequence[str | int] | None) -> None:
    for what, tensor, shape in (("features", features, "(B, N, C)"), ("attention", attention, "(B, H, N)")):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 3 or tensor.shape[1 if what == "attention" else 2] == 0:
            raise ValueError(f"{what} must be {shape} with H, C > 0, got shape {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{what} must be floating point, got {tensor.dtype}")
    if features.shape[0] != attention.shape[0] or features.shape[1] != attention.shape[2]:
        raise ValueError(
            f"features (B, N, C) and attention (B, H, N) disagree on B or N: "
            f"got {tuple(features.shape)} and {tuple(attention.shape)}"
        )
    if features.device != attention.device:
        raise ValueError(f"features are on {features.device}, attention is on {attention.device}")
    if keys is not None and (isinstance(keys, str) or len(keys) != features.shape[0]):
        raise ValueError(f"keys must hold one identity per row: {features.shape[0]} rows, got {keys!r}")
    # One float64 sum is finite only if every term is, and costs a tenth of testing every element. Both sums
    # are looked at together: on a GPU every look waits for it.
    if torch.isfinite(features.sum(dtype=torch.float64) + attention.sum(dtype=torch.float64)):
        return
    for what, tensor in (("features", features), ("attention", attention)):
        rows = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero().flatten().tolist()
        if rows:  # empty: finite, but the sum overflowed
            raise ValueError(f"{what} {tuple(tensor.shape)} hold NaN or infinite values in rows {rows}")

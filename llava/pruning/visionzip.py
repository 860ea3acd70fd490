"""VisionZip (CVPR 2025): [CLS], the most attended patches, and contextual tokens merged from the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import CLS_PLACE, NO_PLACE, Kept, Pruner, attention_order
from .diversity import MIN_SQUARE
from .greedy import row_products
from .registry import register_pruner


@register_pruner("visionzip")
@dataclass(frozen=True)
class VisionZip(Pruner):
    """Keep d dominant tokens, [CLS] being one of them, and merge the other patches into c contextual tokens.

    c = floor(5 T / 32) and d = T - c, which gives the published splits: 162 + 30, 108 + 20, 54 + 10, 27 + 5.
    Columns are [CLS], the dominant patches in raster order, and the contextual tokens.

    Args:
        dominant: d, at least 1 (default: T - c).
        contextual: c (default: T - d, or by the rule).
    """

    dominant: int | None = None
    contextual: int | None = None

    cues = ("keys", "cls")
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dominant", "contextual"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if self.tokens is None and not (self.dominant is None and self.contextual is None):
            raise ValueError(
                "tokens: None keeps all tokens, so dominant and contextual would do nothing. Pass their sum "
                "as tokens."
            )
        if self.tokens:
            _split(self.tokens, self.dominant, self.contextual)

    def choose(self, features, cues, tokens):
        rows, n = features.shape[:2]
        dominant, contextual = _split(tokens, self.dominant, self.contextual)
        order = attention_order(cues.attention)
        patches, rest = order[:, : dominant - 1].sort().values, order[:, dominant - 1 :].sort().values
        values, keys = features.to(torch.float64), cues["keys"][:, 1:].to(torch.float64)
        merged, target = merge_into_targets(_take(values, rest), _take(keys, rest), contextual)
        columns = [cues["cls"][:, None].to(torch.float64), _take(values, patches), merged]

        groups = torch.full((rows, n), -1, dtype=torch.int64, device=features.device)
        groups.scatter_(1, rest, target + dominant if contextual else target)
        groups.scatter_(1, patches, torch.arange(1, dominant, device=features.device).repeat(rows, 1))
        places = torch.full((rows, tokens), NO_PLACE, dtype=torch.int64, device=features.device)
        places[:, 0].fill_(CLS_PLACE)
        places[:, 1:dominant].copy_(patches)
        return Kept(places, places >= 0, torch.cat(columns, dim=1).to(features.dtype), groups)

    def flops(self, patches, channels, projected):
        if not self.tokens or self.tokens >= patches:
            return 0.0
        dominant, contextual = _split(self.tokens, self.dominant, self.contextual)
        return 2.0 * (patches + 1 - dominant) * contextual * channels


def merge_into_targets(values: Tensor, keys: Tensor, contextual: int) -> tuple[Tensor, Tensor]:
    """Merge every token into the most similar of evenly spaced target tokens.

    Args:
        values: (B, n, C) float64.
        keys: (B, n, d) float64, compared by cosine; a key of zero norm has cosine 0 with all.
        contextual: Targets c, at the places 0, step, 2 step ... with step = max(1, n // c).
    Returns:
        (B, c, C): each target plus the mean of its members, and (B, n) int64: the target of every token, -1
        without targets.
    Raises:
        ValueError: for more targets than tokens.
    """
    rows, n = keys.shape[:2]
    if contextual > n:
        raise ValueError(
            f"contextual: got {contextual}, but only {n} tokens are not dominant. "
            "Use fewer contextual or fewer dominant tokens."
        )
    if contextual == 0:
        return values[:, :0], torch.full((rows, n), -1, dtype=torch.int64, device=keys.device)
    step = max(1, n // contextual)
    at = slice(0, (contextual - 1) * step + 1, step)
    norm = (keys * keys).sum(dim=2, keepdim=True).sqrt_()
    unit = (keys / norm).masked_fill_(norm * norm < MIN_SQUARE, 0.0)
    similarity = row_products(unit, unit[:, at].transpose(1, 2))
    # A product may round the columns of equal targets differently: all of them share the first one's.
    number = torch.arange(contextual, device=keys.device)
    equal = (keys[:, at, None] == keys[:, None, at]).all(dim=3)
    first = equal.to(torch.int64).argmax(dim=2)
    target = similarity.gather(2, first[:, None].expand(-1, n, -1)).argmax(dim=2)
    target[:, at].copy_(number)
    member = (target[:, :, None] == number).to(values.dtype)
    member[:, at].zero_()
    total = row_products(member.transpose(1, 2), values)
    return values[:, at] + total / member.sum(dim=1).clamp_(min=1)[:, :, None], target


def _split(tokens: int, dominant: int | None, contextual: int | None) -> tuple[int, int]:
    """Divide a budget into (dominant, contextual)."""
    if contextual is None:
        contextual = tokens * 5 // 32 if dominant is None else tokens - dominant
    if dominant is None:
        dominant = tokens - contextual
    if dominant < 1 or contextual < 0 or dominant + contextual != tokens:
        raise ValueError(
            f"dominant, contextual: got {dominant} and {contextual} for {tokens} tokens. [CLS] is a dominant "
            "token. Use numbers >= 1 and >= 0 whose sum is the budget."
        )
    return dominant, contextual


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))

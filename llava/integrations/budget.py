"""How many tokens of a row are kept: a number, a share, or a part of the number for a whole clip."""

from __future__ import annotations

import operator
from dataclasses import dataclass


@dataclass(frozen=True)
class HostBudget:
    """Tokens to keep per row (an image, crop, tile or frame).

    Args:
        tokens: Tokens per row.
        keep: Share of each row's tokens, in (0, 1]; at least one token is kept.
        clip_tokens: Tokens per video, shared by its frames; the other two are then for images only.

    Raises:
        ValueError: a value of the wrong type or range, or `tokens` and `keep` together.
    """

    tokens: int | None = None
    keep: float | None = None
    clip_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "clip_tokens"):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                number = -1 if isinstance(value, bool) else operator.index(value)
            except TypeError:
                number = -1
            if number < 0:
                raise ValueError(f"{name}: expected an integer >= 0, got {value!r}. Pass the tokens to keep.")
            object.__setattr__(self, name, number)
        if self.keep is not None:
            number = isinstance(self.keep, (int, float)) and not isinstance(self.keep, bool)
            if not number or not 0 < self.keep <= 1:
                raise ValueError(
                    f"keep: expected a number in (0, 1], got {self.keep!r}. It is a share; pass a number of "
                    "tokens as tokens=."
                )
            object.__setattr__(self, "keep", float(self.keep))
        if self.tokens is not None and self.keep is not None:
            raise ValueError(
                f"tokens, keep: both are given ({self.tokens} and {self.keep}). Pass one of them."
            )

    @property
    def is_empty(self) -> bool:
        """Whether there is no budget at all."""
        return self.tokens is None and self.keep is None and self.clip_tokens is None

    def of_row(self, total: int, frame: tuple[int, int] | None = None, crops: int = 1) -> int | None:
        """Return the tokens to keep of a row, None for all.

        Args:
            total: Tokens of the row, N.
            frame: (i, f) of the i-th of f frames of a clip; None for an image.
            crops: Crops that are joined in this row; `tokens` is per crop.
        """
        if frame is not None and self.clip_tokens is not None:
            number, frames = frame
            return self.clip_tokens * (number + 1) // frames - self.clip_tokens * number // frames
        if self.tokens is not None:
            return self.tokens * crops
        if self.keep is not None and self.keep < 1:
            return max(1, round(self.keep * total))
        return None

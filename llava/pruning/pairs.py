"""All pairs of the tokens of a long row, in blocks: the matrix of their similarities is never held.

    if is_large(n):
        pairs = PairLines(x)
        pairs.line(token)               # (N,) float64, dot products with all tokens

A row of N tokens has N * N similarities: 128 MiB in float64 for 4,096 tokens, 2 GiB for 16,384. Rows of more
than `base.LARGEST` tokens are therefore read line by line, where shorter ones have the whole matrix. Entries
are the same but for the last bit of a dot product, so the chosen tokens are the same (see `diversity`).
Tokens with equal features form a group, which has one line, so they tie exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ENTRIES = 2**22  # of a block, or of the lines that are remembered: 32 MiB
AHEAD = 32  # lines that are computed together, because the next choices are probably among them
MIN_SQUARE, MAX_SQUARE = 1e-100, 1e100  # squared norms: below counts as zero, above is refused

Finish = Callable[[Tensor, Tensor, Tensor], Tensor]


class PairLines:
    """Lines of the symmetric matrix of all pairs of a row's tokens, computed when they are read.

    Args:
        x: (N, C) floating point. The entries are dot products at first; see `then`.
    Attributes:
        place: (N,) int64, the group of each token.
        square: (G,) float64, squared norms of the groups.
    Raises:
        ValueError: for features whose squared norm is not below 1e100.
    """

    def __init__(self, x: Tensor) -> None:
        self._distinct, self.place = torch.unique(x.to(torch.float64), dim=0, return_inverse=True)
        self.square = (self._distinct * self._distinct).sum(dim=1)
        check_square(self.square.max().item())
        self._steps: list[Finish] = []
        self._change: Callable[[Tensor], Tensor] | None = None
        self._remembered: dict[int, Tensor] = {}
        self._expected: Tensor | None = None

    def __len__(self) -> int:
        return len(self.place)

    def then(self, finish: Finish) -> PairLines:
        """Return the same pairs with other entries.

        Args:
            finish: Called with entries (m, n) and the groups of their rows (m,) and columns (n,), int64;
                returns new entries, and may overwrite the old ones.
        """
        new = copy.copy(self)
        new._steps, new._remembered, new._expected = [*self._steps, finish], {}, None
        return new

    def each_line(self, change: Callable[[Tensor], Tensor]) -> PairLines:
        """Return the same pairs with lines (m, N) that `change` returns; only `lines` and `line` show it."""
        new = copy.copy(self)
        new._change, new._remembered, new._expected = change, {}, None
        return new

    def of_groups(self, values: Tensor) -> Tensor:
        """Return values per group (G,) from values per token (N,), equal within a group."""
        return values.new_empty(len(self._distinct)).scatter_(0, self.place, values)

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Compute entries of groups: (m,), (n,) int64 -> (m, n) float64."""
        products = self._distinct[rows] @ self._distinct[columns].T
        own = rows[:, None] == columns
        entries = torch.where(own, self.square[rows][:, None], products)  # the same bits as `square`
        for step in self._steps:
            entries = step(entries, rows, columns)
        return entries

    def lines(self, groups: Tensor) -> Tensor:
        """Compute the entries of some groups with all tokens: (m,) int64 -> (m, N) float64."""
        lines = self.block(groups, self._all())[:, self.place]
        return lines if self._change is None else self._change(lines)

    def blocks(self) -> Iterator[Tensor]:
        """Yield all groups, in parts whose lines have `ENTRIES` entries."""
        size = max(1, ENTRIES // len(self.place))
        yield from self._all().split(size)

    def per_token(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function to all lines, (m, N) -> (m,), and return its results per token (N,)."""
        return torch.cat([reduce(self.lines(groups)) for groups in self.blocks()])[self.place]

    def own(self) -> Tensor:
        """Return the diagonal per group, (G,)."""
        return torch.cat([self.block(part, part).diagonal() for part in self._all().split(AHEAD)])

    def nearest_other(self) -> Tensor:
        """Return each token's largest entry with another token, (N,).

        An entry is computed once for both of its tokens: two that are nearest to each other tie.
        """
        count = torch.bincount(self.place, minlength=len(self._distinct))
        best = torch.where(count > 1, self.own(), -torch.inf)
        parts = list(self.blocks())
        for number, rows in enumerate(parts):
            for columns in parts[number:]:
                entries = self.block(rows, columns)
                if columns is rows:
                    entries = torch.maximum(entries, entries.T).fill_diagonal_(-torch.inf)
                best[rows] = torch.maximum(best[rows], entries.amax(dim=1))
                best[columns] = torch.maximum(best[columns], entries.amax(dim=0))
        return best[self.place]

    def expect(self, score: Tensor) -> None:
        """Take the scores (N,) of the next choice: lines of the largest are computed together."""
        self._expected = score

    def line(self, token: int) -> Tensor:
        """Return the line of one token, (N,); lines that are probably read next are computed with it."""
        group = int(self.place[token])
        if group not in self._remembered:
            likely = [group]
            if self._expected is not None:
                top = self._expected.topk(min(AHEAD, len(self))).indices
                likely += [one for one in self.place[top].tolist() if one not in self._remembered]
            likely = list(dict.fromkeys(likely))
            if (len(self._remembered) + len(likely)) * len(self) > ENTRIES:
                self._remembered.clear()
            lines = self.lines(torch.tensor(likely, device=self.place.device))
            self._remembered.update(zip(likely, lines, strict=True))
        return self._remembered[group]

    def _all(self) -> Tensor:
        return torch.arange(len(self._distinct), device=self.place.device)


def check_square(largest: float) -> None:
    """Check the largest squared norm of a row's features.

    Raises:
        ValueError: unless it is below 1e100.
    """
    if not largest < MAX_SQUARE:
        raise ValueError(
            "features too large for float64 similarities: "
            f"the largest squared norm is {largest:.3g}, the limit is 1e100"
        )

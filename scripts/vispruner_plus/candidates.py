"""The candidates of docs/vispruner_plus.md, and the sweep that knows them.

    python scripts/vispruner_plus/candidates.py --methods scope,fl2 --tokens 32,16 --data DIR --output OUT

Arguments are those of `python -m llava.eval.sweep`. All candidates are without training and without text.
Selections are remembered for the next benchmark with the same images.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.eval import sweep
from llava.pruning import register_pruner
from llava.pruning.base import Kept, Pruner, mean_attention
from llava.pruning.greedy import cosines, greedy, line, min_max, power, spread, sum_of_heads
from llava.pruning.scope import cover
from llava.pruning.score import WeightedFarthest

_last: list[tuple[float, Tensor]] = []


def centered_cosines(features: Tensor) -> Tensor:
    """Return a copy of the cosines of features minus their mean, which the candidates share."""
    x = features.to(torch.float64)
    key = x.sum().item()
    if not _last or _last[0][0] != key:
        _last[:] = [(key, cosines(torch.stack([row - row.mean(dim=0) for row in x])))]
    return _last[0][1].clone()


def facility_location(kernel: Tensor, demand: Tensor, tokens: int) -> Kept:
    """Maximize sum_i demand_i * max_j kernel_ij greedily: every patch by its most similar kept token."""
    chosen = cover(kernel.clamp(min=0) * demand[:, None], torch.ones_like(demand), tokens)
    return Kept.from_selected(chosen, 0)


@dataclass(frozen=True)
class Candidate(Pruner):
    def demand(self, attention: Tensor, tokens: int) -> Tensor:
        return attention

    def kernel(self, features: Tensor) -> Tensor:
        return centered_cosines(features).clamp_(min=0).square_()

    def choose(self, features, cues, tokens):
        return facility_location(
            self.kernel(features), self.demand(mean_attention(cues.attention), tokens), tokens
        )


@register_pruner("fl1")
class Linear(Candidate):
    def kernel(self, features):
        return centered_cosines(features)


@register_pruner("fl2")
class Squared(Candidate):
    """The lead: weighted facility location over squared positive cosines of centered features."""


@register_pruner("fl4")
class Fourth(Candidate):
    def kernel(self, features):
        return super().kernel(features).square_()


@register_pruner("fl2-cap")
class Capped(Candidate):
    """No patch has more than 5 times the mean attention: removes sinks."""

    def demand(self, attention, tokens):
        return torch.minimum(attention, 5 * attention.mean(dim=1, keepdim=True))


@register_pruner("fl2-flat")
class Flat(Candidate):
    def demand(self, attention, tokens):
        return power(attention, 0.7)


@register_pruner("fl2-sharp")
class Sharp(Candidate):
    def demand(self, attention, tokens):
        return power(attention, 1.5)


@register_pruner("fl2-spread")
class Spread(Candidate):
    """The demand is a ** e, with e in [0.25, 4] such that exp(entropy) is 4 patches per kept token."""

    def demand(self, attention, tokens):
        found = torch.empty_like(attention)
        for row, a in enumerate(attention):
            low, high = 0.25, 4.0
            for _ in range(30):
                middle = (low + high) / 2
                p = a**middle / (a**middle).sum()
                entropy = -(p * p.clamp(min=1e-300).log()).sum()
                low, high = (middle, high) if entropy.exp() > 4 * tokens else (low, middle)
            found[row] = power(a[None], low)[0]
        return found


@register_pruner("fl2-even")
class Even(Candidate):
    """A control: every patch has the same demand, so that importance plays no part."""

    def demand(self, attention, tokens):
        return torch.ones_like(attention)


@register_pruner("scope2c")
class ScopeCentered(Pruner):
    """SCOPE with squared positive cosines of centered features."""

    def choose(self, features, cues, tokens):
        kernel = centered_cosines(features).clamp_(min=0).square_()
        return Kept.from_selected(cover(kernel, sum_of_heads(cues.attention), tokens), 0)


@register_pruner("demand")
class Demand(Candidate):
    """Weighted facility location over positive cosines of the features as they are."""

    def kernel(self, features):
        return cosines(features)


@register_pruner("css")
class ColumnSubset(Pruner):
    """Choose the token that explains the most attention-weighted energy that the chosen ones leave over."""

    def choose(self, features, cues, tokens):
        gram, weight = centered_cosines(features), mean_attention(cues.attention)

        def score() -> Tensor:
            energy = gram.diagonal(dim1=1, dim2=2)
            explained = (gram.square() * weight[:, None]).sum(dim=2)
            return torch.where(energy > 1e-9, explained / energy.clamp(min=1e-9), 0.0)

        def update(last: Tensor) -> Tensor:
            found = line(gram, last)
            gram.sub_(found[:, :, None] * (found / found.gather(1, last).clamp(min=1e-9))[:, None])
            return score()

        return Kept.from_selected(greedy(score(), tokens, update), 0)


def unlike(features: Tensor) -> Tensor:
    """Return minus the mean cosine with all tokens, scaled to [0, 1] per row: how unlike others each is."""
    unit = torch.nn.functional.normalize(features.to(torch.float64), dim=2)
    return min_max(-torch.stack([row @ row.mean(dim=0) for row in unit]))


@register_pruner("fl2-unlike")
class Unlike(Pruner):
    """Round 2: demand is attention times how unlike the others a patch is."""

    def choose(self, features, cues, tokens):
        demand = mean_attention(cues.attention) * unlike(features)
        kernel = centered_cosines(features).clamp_(min=0).square_()
        return facility_location(kernel, demand, tokens)


@register_pruner("fl2-proj")
class Projected(Pruner):
    """Round 2: the kernel is of projected tokens."""

    cues = ("projected",)

    def demand(self, cues) -> Tensor:
        return mean_attention(cues.attention)

    def choose(self, features, cues, tokens):
        kernel = centered_cosines(cues["projected"]).clamp_(min=0).square_()
        return facility_location(kernel, self.demand(cues), tokens)


@register_pruner("fl2-proj-unlike")
class ProjectedUnlike(Projected):
    """Round 2: kernel and unlikeness are of projected tokens."""

    def demand(self, cues):
        return mean_attention(cues.attention) * unlike(cues["projected"])


class Far(Pruner):
    """Round 3: the largest weight first, then always weight times distance to the kept ones (centered)."""

    def weight(self, features: Tensor, attention: Tensor) -> Tensor:
        return power(attention, 0.5) * unlike(features)

    def choose(self, features, cues, tokens):
        weight = self.weight(features, mean_attention(cues.attention))
        chosen = spread(centered_cosines(features), weight, tokens, lambda closest: weight * (1 - closest))
        return Kept.from_selected(chosen, 0)


@register_pruner("far-a-u")
class FarBoth(Far):
    pass


@register_pruner("far-a")
class FarAttention(Far):
    def weight(self, features, attention):
        return power(attention, 0.5)


@register_pruner("far-u")
class FarUnlike(Far):
    def weight(self, features, attention):
        return unlike(features)


@register_pruner("fl4-spread")
class FourthSpread(Spread, Fourth):
    pass


@register_pruner("score-half")
@dataclass(frozen=True)
class ScoreHalf(WeightedFarthest):
    """A competitor: "score" with the exponent 0.5."""

    exponent: float = 0.5


NOT_NESTED = {
    "vispruner",
    "fl2-spread",
    "fl4-spread",
}  # a larger budget is not a continuation of a smaller one
NESTED_TO = 64


def remember_selections() -> None:
    """Make `Pruner.keep` select each row once, whatever number of benchmarks and budgets shows it.

    What greedy methods keep at a budget is the beginning of what they keep at a larger one.
    """
    known: dict[tuple[object, ...], Tensor] = {}
    orders: list[Tensor] = []
    select, from_selected = Pruner.keep, Kept.from_selected

    def recorded(selected: Tensor, n_important: int) -> Kept:
        orders.append(selected)
        return from_selected(selected, n_important)

    def keep(self, features, attention, crop_ids=None, question=None, cues=None):
        if self.tokens is None or self.needs_question or self.uses_seed or self.is_adaptive:
            return select(self, features, attention, crop_ids, question, cues)
        nested = self.name not in NOT_NESTED and self.tokens <= NESTED_TO
        wide = replace(self, tokens=NESTED_TO) if nested else self
        found = []
        for row in range(len(features)):
            own = {name: cue[row : row + 1] for name, cue in (cues or {}).items()}
            x, a = features[row : row + 1], attention[row : row + 1]
            key = (wide, x.double().sum().item(), a.double().sum().item(), a[0, 0, 0].item())
            if key not in known:
                orders.clear()
                select(wide, x, a, None, None, own)
                known[key] = orders[-1]
            found.append(known[key][:, : self.tokens])
        important = self.tokens if self.scores_attention else 0
        if self.uses_ratio:
            important = int(self.tokens * self.important_ratio)
        return from_selected(torch.cat(found), important)

    Pruner.keep, Kept.from_selected = keep, staticmethod(recorded)


if __name__ == "__main__":
    remember_selections()
    sys.exit(sweep.main())

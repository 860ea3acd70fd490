"""How many visual tokens each batch keeps: one budget, or one of several drawn per batch.

    budgets = Budgets.parse("vispruner", "32,64,128,576", important_ratio=0.5, seed=42)
    budgets.draw(step, micro)          # the pruner of a batch: the same on all processes and after a resume

Independent of the model and of the trainer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from llava.pruning import Pruner, get_pruner

_ALL = "none"
_EVERY = 2**31  # a budget that no crop has


@dataclass(frozen=True)
class Budgets:
    """The pruners that a run draws from.

    Attributes:
        pruners: one per budget, ascending; without pruning last.
        seed: decides the draws of budgets and, for random methods, of tokens.
    """

    pruners: tuple[Pruner, ...]
    seed: int = 0

    @classmethod
    def parse(cls, method: str, budgets: str, important_ratio: float = 0.5, seed: int = 0) -> Budgets:
        """Read the values of `--method`, `--visual_token_num` and `--important_ratio`.

        Args:
            budgets: visual tokens per crop, N or N,N,...; "none" keeps all.

        Raises:
            ValueError: an unknown method, one that cannot be trained with, or an invalid budget or ratio.
        """
        base = _named("--method", method, None, important_ratio, seed)
        check_trainable(base)
        counts = sorted({_count(part.strip(), budgets) for part in str(budgets).split(",")})
        pruners = [
            get_pruner(_ALL)
            if count == _EVERY
            else _named(f"--visual_token_num {count}", method, count, important_ratio, seed)
            for count in counts
        ]
        return cls(tuple(pruners), seed)

    @property
    def varies(self) -> bool:
        """Whether batches differ: several budgets, or tokens that are drawn."""
        return len(self.pruners) > 1 or self.pruners[0].uses_seed

    @property
    def cues(self) -> tuple[str, ...]:
        """Everything that one of the pruners reads of the tower, sorted."""
        return tuple(sorted({cue for pruner in self.pruners for cue in pruner.cues}))

    def within(self, patches: int) -> Budgets:
        """Return the same budgets for crops of `patches` patches: one of at least that many keeps all."""
        pruned = [one for one in self.pruners if not _keeps_all(one, patches)]
        whole = [get_pruner(_ALL)] if len(pruned) < len(self.pruners) else []
        return dataclasses.replace(self, pruners=(*pruned, *whole))

    def draw(self, step: int, micro: int = 0) -> Pruner:
        """Return the pruner of a batch.

        It depends on nothing but its arguments and `seed`. A random method draws other tokens for the same
        image in every batch.

        Args:
            step: optimizer steps before this batch.
            micro: batches before it in the same step.
        """
        digest = hashlib.sha256(f"{self.seed}/{step}/{micro}".encode()).digest()
        pruner = self.pruners[int.from_bytes(digest[:8], "big") % len(self.pruners)]
        if pruner.uses_seed:
            pruner = dataclasses.replace(pruner, seed=int.from_bytes(digest[8:14], "big"))
        return pruner


def check_trainable(pruner: Pruner) -> None:
    """Raise `ValueError` for methods that need more than an image before the language model."""
    if pruner.acts_in == "decoder":
        why = "prunes inside the language model, which training runs with all visual tokens"
    elif pruner.needs_question:
        why = "selects by the question, and a training sample can have several"
    elif "projected" in pruner.cues:
        why = "reads projected tokens, which training changes"
    elif pruner.positions == "original":
        why = "keeps the positions of the unpruned prompt"
    else:
        return
    raise ValueError(f"--method: {pruner.name!r} {why}. Choose another method, such as vispruner.")


def _named(where: str, method: str, count: int | None, important_ratio: float, seed: int) -> Pruner:
    try:
        return get_pruner(method, tokens=count, important_ratio=important_ratio, seed=seed)
    except ValueError as error:
        where = "--important_ratio" if "important_ratio" in str(error) else where
        raise ValueError(f"{where}: {error}.") from error


def _count(part: str, whole: str) -> int:
    """Parse one budget."""
    if part.lower() in ("none", "full", "all"):
        return _EVERY
    if not (part.isascii() and part.isdecimal() and 0 < int(part) < _EVERY):
        raise ValueError(
            f"--visual_token_num {whole}: {part!r} is not a budget. Set the visual tokens per crop, at "
            "least 1 (64), several to draw from (32,64,128,576), or none for all."
        )
    return int(part)


def _keeps_all(pruner: Pruner, patches: int) -> bool:
    """Return whether a pruner leaves a crop of `patches` patches as it is."""
    return pruner.tokens is None or (pruner.tokens >= patches and not pruner.is_adaptive)

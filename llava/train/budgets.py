"""Which tokens stay in each batch of a training: one budget, or one drawn per batch.

budgets = Budgets.parse("vispruner", "32,64,128,576", important_ratio=0.5, seed=42)
budgets.draw(step, micro)     # the same on all processes, and after a resume
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from llava.pruning import Pruner, get_pruner


@dataclass(frozen=True)
class Budgets:
    """Pruners of one method, of which every batch gets one.

    Attributes:
        pruners: one per budget.
        seed: of the draws.
    """

    pruners: tuple[Pruner, ...]
    seed: int

    @classmethod
    def parse(cls, method: str, budgets: str, important_ratio: float, seed: int) -> Budgets:
        """Read `--visual_token_num`: none, a number, or numbers separated by commas.

        Raises:
            ValueError: not numbers, or an unknown method.
        """
        pruners = []
        for word in str(budgets).split(","):
            word = word.strip().lower()
            if word != "none" and not word.isdecimal():
                raise ValueError(
                    f"--visual_token_num: {word!r} is not a number of tokens. Set N, N,N,... or none."
                )
            if word == "none":
                pruners.append(get_pruner("none"))
            else:
                pruners.append(get_pruner(method, tokens=int(word), important_ratio=important_ratio))
        return cls(tuple(pruners), seed)

    @property
    def varies(self) -> bool:
        """Whether batches differ: several budgets, or a random choice of tokens."""
        return len(self.pruners) > 1 or any(one.uses_seed for one in self.pruners)

    def draw(self, step: int, micro: int) -> Pruner:
        """Return the pruner of a batch.

        Args:
            step: steps of the optimizer before it.
            micro: batches of the same step before it.
        """
        stream = random.Random(f"{self.seed}/{step}/{micro}")
        chosen = stream.choice(self.pruners)
        if chosen.uses_seed:
            chosen = dataclasses.replace(chosen, seed=stream.getrandbits(32))
        return chosen

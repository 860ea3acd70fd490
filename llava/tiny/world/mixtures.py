"""Mixtures of training questions: probabilities of the question types.

Few types learn several times faster than many: with "wide" from the start, yes/no questions reached 62% on
validation images after 800 steps. A run therefore starts with "pope" and continues with "suite", which has
the types of all bundled benchmarks, and with "late", which has more of the types that were at chance by then.
The tokenizer is trained on "wide".
"""

from __future__ import annotations

import numpy as np

from .questions import (
    Maker,
    choice,
    choice_color,
    color,
    color_check,
    count,
    count_check,
    exist,
    inventory,
    mme,
    position,
    read,
    science,
    unanswerable,
)
from .scenes import Scene

MIXTURES: dict[str, dict[Maker, float]] = {
    "pope": {exist: 0.80, color: 0.12, color_check: 0.08},
    "suite": {
        exist: 0.30,
        color: 0.08,
        color_check: 0.08,
        count: 0.09,
        count_check: 0.05,
        position: 0.09,
        mme: 0.08,
        choice: 0.08,
        choice_color: 0.03,
        science: 0.03,
        read: 0.04,
        unanswerable: 0.03,
        inventory: 0.02,
    },
    "late": {
        position: 0.24,
        exist: 0.16,
        choice: 0.14,
        count: 0.10,
        read: 0.08,
        mme: 0.06,
        color: 0.05,
        color_check: 0.04,
        choice_color: 0.04,
        count_check: 0.03,
        unanswerable: 0.03,
        science: 0.02,
        inventory: 0.01,
    },
    "wide": {
        exist: 0.50,
        color: 0.07,
        color_check: 0.06,
        count: 0.09,
        count_check: 0.03,
        position: 0.05,
        choice: 0.09,
        read: 0.04,
        unanswerable: 0.04,
        inventory: 0.03,
    },
}


def ask(
    scene: Scene, rs: np.random.RandomState, number: int, mixture: str = "wide"
) -> list[tuple[str, str, str]]:
    """Sample `number` training questions about a scene: (type, question, answer)."""
    makers, weights = zip(*MIXTURES[mixture].items(), strict=True)
    out: list[tuple[str, str, str]] = []
    while len(out) < number:
        maker = makers[rs.choice(len(makers), p=weights)]
        pair = maker(scene, rs)
        if pair is not None:
            out.append((maker.__name__, *pair))
    return out

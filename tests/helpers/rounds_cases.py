"""The kernel of the selection's rounds against the rounds in torch, on random similarities.

    TRITON_INTERPRET=1 PYTHONPATH=.:tests python -m helpers.rounds_cases 1000

A process of its own, because Triton decides when it is imported whether it will interpret.
"""

import sys

import numpy as np
import torch


def random_similarities(rng):
    """Similarities of up to 40 tokens: real, or of few values so that most tie, or with zero-norm tokens."""
    rows, size = rng.integers(1, 4), rng.integers(2, 41)
    kind = rng.integers(3)
    similar = rng.uniform(-1, 1, (rows, size, size))
    if kind > 0:
        similar = np.round(similar)
    if kind == 2:
        zero = rng.uniform(size=size) < 0.2
        similar[:, zero] = -np.inf
        similar[:, :, zero] = np.inf
    residual = np.stack([rng.permutation(size) for _ in range(rows)])
    return torch.from_numpy(similar), torch.from_numpy(residual), int(rng.integers(1, size + 1))


def compare(cases, seed=0, device="cpu"):
    """How many of `cases` came out equal."""
    from llava.pruning.kernels.rounds import thin
    from llava.pruning.vispruner import thin_by_torch

    rng, equal = np.random.default_rng(seed), 0
    for _ in range(cases):
        similar, residual, target = random_similarities(rng)
        found = thin(similar.to(device), residual.to(device), target).cpu()
        equal += torch.equal(found, thin_by_torch(similar, residual, target))
    return equal


if __name__ == "__main__":
    print(compare(int(sys.argv[1])))

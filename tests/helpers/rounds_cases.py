"""Compare the Triton kernel of the rounds with the rounds in torch, on random similarities.

    TRITON_INTERPRET=1 PYTHONPATH=.:tests python -m helpers.rounds_cases 1000

Run it in a process of its own, because Triton reads TRITON_INTERPRET when it is imported.
"""

import sys

import numpy as np
import torch


def random_similarities(rng):
    """Similarities of up to 40 tokens: real, or of few values so that most tie, or with zero-norm tokens."""
    rows, size = rng.integers(1, 4), rng.integers(2, 41)
    kind = rng.integers(3)
    similarity = rng.uniform(-1, 1, (rows, size, size))
    if kind > 0:
        similarity = np.round(similarity)
    if kind == 2:
        zero = rng.uniform(size=size) < 0.2
        similarity[:, zero] = -np.inf
        similarity[:, :, zero] = np.inf
    residual = np.stack([rng.permutation(size) for _ in range(rows)])
    return torch.from_numpy(similarity), torch.from_numpy(residual), int(rng.integers(1, size + 1))


def compare(cases, seed=0, device="cpu"):
    """Return how many of `cases` are equal."""
    from llava.pruning.diversity import remove_duplicates_in_torch
    from llava.pruning.kernels.rounds import remove_duplicates

    rng, equal = np.random.default_rng(seed), 0
    for _ in range(cases):
        similarity, residual, target = random_similarities(rng)
        found = remove_duplicates(similarity.to(device), residual.to(device), target).cpu()
        equal += torch.equal(found, remove_duplicates_in_torch(similarity, residual, target))
    return equal


if __name__ == "__main__":
    print(compare(int(sys.argv[1])))

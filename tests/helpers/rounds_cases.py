"""Compare the Triton kernels of the selection with the torch code, on random inputs.

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


def compare(cases, seed=0, device="cpu", lists=(1, 2, 4, 8), direct=(0, 4, 16)):
    """Return for how many of `cases` the rounds select the same, with short lists so that many fall short."""
    from llava.pruning.diversity import remove_duplicates_in_torch
    from llava.pruning.kernels import rounds

    rng, equal = np.random.default_rng(seed), 0
    constants = rounds._NEIGHBORS, rounds._DIRECT
    for _ in range(cases):
        similarity, residual, target = random_similarities(rng)
        rounds._NEIGHBORS, rounds._DIRECT = int(rng.choice(lists)), int(rng.choice(direct))
        found = rounds.remove_duplicates(similarity.to(device), residual.to(device), target).cpu()
        equal += torch.equal(found, remove_duplicates_in_torch(similarity, residual, target))
    rounds._NEIGHBORS, rounds._DIRECT = constants
    return equal


def compare_products(cases, seed=0, device="cpu"):
    """Return for how many of `cases` the similarities and the exceptional rows are equal to the bit."""
    from llava.pruning.diversity import _similarity_of_products
    from llava.pruning.kernels import rounds

    rng, equal = np.random.default_rng(seed), 0
    limits = 1 - 1e-9, 1e-100, 1e100
    for _ in range(cases):
        rows, size, channels = rng.integers(1, 4), rng.integers(2, 41), rng.integers(1, 6)
        x = torch.from_numpy(rng.standard_normal((rows, size, channels)))
        row, token = rng.integers(rows), rng.integers(size)
        x[row, token] = float(rng.choice([0, np.nan, np.inf, 1e-60, 1e60, 1e200, 1]))
        if rng.integers(3) == 0:
            x[row, rng.integers(size)] = x[row, token] * 2  # parallel
        products = x @ x.mT
        expected = _similarity_of_products(products, *limits)
        found = rounds.signed_square_cosines(products.clone().to(device), *limits)
        equal += all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    return equal


def compare_attention(cases, seed=0, device="cpu"):
    """Return for how many of `cases` the means are equal to the bit, and the orders are equal."""
    from llava.pruning.base import _descending, _mean_attention
    from llava.pruning.kernels.attention import descending, mean_attention

    rng, equal = np.random.default_rng(seed), 0
    for _ in range(cases):
        rows, heads, n = rng.integers(1, 4), rng.integers(1, 6), rng.integers(1, 200)
        attention = torch.from_numpy(rng.uniform(size=(rows, n, heads))).mT  # not contiguous
        if rng.integers(2):
            attention = (attention * 4).round() / 4
        attention = attention.to([torch.float64, torch.float32, torch.float16][rng.integers(3)])
        mean = _mean_attention(attention)
        found = mean_attention(attention.to(device))
        equal += torch.equal(found.cpu(), mean) and torch.equal(descending(found).cpu(), _descending(mean))
    return equal


if __name__ == "__main__":
    count = int(sys.argv[1])
    print(compare(count), compare_products(count), compare_attention(count))

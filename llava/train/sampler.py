"""Order samples so that the samples of a global batch have similar lengths, and one modality if wanted.

    sampler = LengthGroupedSampler(batch_size=16, world_size=8, lengths=dataset.modality_lengths,
                                   seed=42, group_by_modality=True)
    sampler.set_epoch(1)

The functions are LLaVA's. There, `get_modality_length_grouped_indices` draws its inner permutations from the
global generator. The sampler gives it a generator that depends on seed and epoch only, so that a resumed run
continues in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Split indices into chunks of equal size and similar total length.

    Where the size is not a multiple of `num_chunks`, every chunk takes each `num_chunks`-th index.

    Args:
        indices: sorted by length, longest first.
        lengths: of all samples.
    """
    if len(indices) % num_chunks:
        return [list(indices[start::num_chunks]) for start in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals: list[float] = [0] * num_chunks
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == size:
            totals[shortest] = float("inf")
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    merge: bool = True,
) -> list[int]:
    """Return a random order in which `world_size` x `batch_size` neighbors are sorted by length.

    Args:
        lengths: in tokens.
        batch_size: of one device.
        world_size: devices x accumulation steps.
        generator: of the permutation (default: torch's global one).
        merge: has no effect; LLaVA's argument.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    step = world_size * batch_size
    indices = []
    for start in range(0, len(order), step):
        group = sorted(order[start : start + step], key=lambda index: lengths[index], reverse=True)
        for chunk in split_to_even_chunks(group, lengths, world_size):
            indices += chunk
    return indices


def get_modality_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    inner: torch.Generator | None = None,
) -> list[int]:
    """Return an order as `get_length_grouped_indices` in which each global batch has one modality.

    What does not fill a batch of its modality comes last.

    Args:
        lengths: positive for samples with an image, negative for those without.
        generator: of the order of batches (default: torch's global one).
        inner: of the order within each modality (default: torch's global one).

    Raises:
        ValueError: a length is 0.
    """
    if not all(lengths):
        place = next(index for index, length in enumerate(lengths) if not length)
        raise ValueError(f"lengths[{place}]: 0 tokens. Remove samples without text.")
    images = [index for index, length in enumerate(lengths) if length > 0]
    texts = [index for index, length in enumerate(lengths) if length < 0]
    if not images or not texts:
        return get_length_grouped_indices(lengths, batch_size, world_size, generator=generator)
    step = world_size * batch_size
    batches, rest = [], []
    for members in (images, texts):
        sizes = [abs(lengths[index]) for index in members]
        order = get_length_grouped_indices(sizes, batch_size, world_size, generator=inner)
        groups = [[members[i] for i in order[start : start + step]] for start in range(0, len(order), step)]
        batches += groups[:-1]
        rest += groups[-1]  # even where it is full
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [index for batch in order for index in batches[batch]] + sorted(rest)


class LengthGroupedSampler(Sampler[int]):
    """Iterate over indices grouped by length; the order depends on `seed` and the epoch only.

    Args:
        batch_size: of one device.
        world_size: devices x accumulation steps.
        lengths: of all samples; signed with `group_by_modality`.
        seed: of the order.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int],
        seed: int = 0,
        group_by_modality: bool = False,
    ) -> None:
        self.batch_size, self.world_size = batch_size, world_size
        self.lengths = lengths
        self.seed, self.epoch = seed, 0
        self.group_by_modality = group_by_modality

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; each has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # One number of both: seed + epoch would give run 1's second epoch the order of run 2's first.
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        sizes = (self.lengths, self.batch_size, self.world_size)
        if self.group_by_modality:
            return iter(get_modality_length_grouped_indices(*sizes, generator=generator, inner=generator))
        return iter(get_length_grouped_indices(*sizes, generator=generator))

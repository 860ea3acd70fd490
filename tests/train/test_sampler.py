"""Batches of one modality and similar length: every index once, in an order that can be resumed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.train.sampler import (
    LengthGroupedSampler,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)

LENGTHS = st.lists(st.integers(-60, 60).filter(bool), min_size=1, max_size=60)


@settings(max_examples=30)
@given(lengths=LENGTHS, batch=st.integers(1, 5), world=st.integers(1, 4), by_modality=st.booleans())
def test_an_epoch_has_every_sample_once_and_whole_batches_of_one_modality(lengths, batch, world, by_modality):
    sizes = lengths if by_modality else [abs(length) for length in lengths]
    sampler = LengthGroupedSampler(batch, world, sizes, seed=7, group_by_modality=by_modality)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
    step = batch * world
    if by_modality:
        signs = [lengths[index] > 0 for index in order]
        # One incomplete batch per modality is left for the end.
        full = sum(max(0, (signs.count(sign) - 1) // step) for sign in (True, False))
        for start in range(0, full * step, step):
            assert len(set(signs[start : start + step])) == 1


def test_the_order_depends_on_seed_and_epoch_only():
    lengths = [(-1) ** n * (n % 11 + 1) for n in range(200)]

    def order(seed, epoch):
        sampler = LengthGroupedSampler(2, 2, lengths, seed=seed, group_by_modality=True)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(3, 0)
    assert order(3, 0) == first  # a resumed run continues where it was
    assert len({tuple(order(seed, epoch)) for seed in (3, 4) for epoch in (0, 1, 2)}) == 6


def test_chunks_have_equal_sizes_and_similar_sums():
    lengths = [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert split_to_even_chunks(list(range(9)), lengths, 3) == [[0, 5, 6], [1, 4, 7], [2, 3, 8]]
    assert split_to_even_chunks([0, 1, 2, 3], lengths, 3) == [[0, 3], [1], [2]]


def test_a_sample_without_text_is_refused():
    with pytest.raises(ValueError, match=r"lengths\[1\]: 0 tokens"):
        get_modality_length_grouped_indices([3, 0, -2], 1, 1)

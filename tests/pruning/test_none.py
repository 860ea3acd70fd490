"""No pruning keeps every token."""

import torch

from llava.pruning import get_pruner


def test_keeps_all_tokens_for_any_budget():
    pruner = get_pruner("none", 5)
    assert pruner.tokens is None and pruner.config() == {"method": "none", "tokens": None}
    assert pruner.select(torch.zeros(2, 7, 3), torch.zeros(2, 1, 7)).tolist() == [list(range(7))] * 2

"""The measurement of the tower: its quotients, and the memory that further layers add."""

import pytest

from helpers.efficiency import run
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS


def test_memory_of_further_layers_and_speedup(capsys):
    out, document = run(capsys, "tower --dummy-model tiny --device cpu --vs baseline --repeats 1")
    row, heads, tokens = document["rows"][0], 3, 577
    assert document["passes"] == 1 and "medians of 1 passes" in out
    assert document["speedup"] == pytest.approx(1 / document["optimized_over_baseline"], rel=1e-2)
    # further layers add no attention matrices here, and one per layer in the baseline
    assert row["optimized"]["peak_bytes_of_more_layers"] <= 0.05 * row["optimized"]["peak_bytes"]
    layers = DUMMY_MODELS["tiny"].tower["num_hidden_layers"]
    matrices = (layers - 1) * heads * tokens**2 * 4
    assert row["baseline"]["peak_bytes_of_more_layers"] == pytest.approx(matrices, rel=0.15)

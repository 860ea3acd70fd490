"""The limits of the device are measured."""

import torch

from helpers.efficiency import run
from llava.analysis.efficiency import peak


def test_rates_are_plausible(capsys):
    assert peak.matrix_rate("cpu", torch.float32, repeats=1) > 1e9
    _, document = run(capsys, "peak --device cpu --dtypes float32 --repeats 1")
    assert document["bytes_per_second"] > 1e8 and [*document["matrix_flops_per_second"]] == ["float32"]

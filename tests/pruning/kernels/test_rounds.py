"""The Triton kernels of the selection equal the torch code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.rounds_cases import compare, compare_attention, compare_products

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_equal_torch_on_a_gpu():
    pytest.importorskip("triton")
    assert compare(2000, device="cuda") == 2000
    assert compare(500, device="cuda", lists=(32,), direct=(64,)) == 500
    assert compare_products(500, device="cuda") == compare_attention(500, device="cuda") == 500


def test_interpreted_kernels_equal_torch():
    """Ties and zero norms included; a process of its own, because Triton reads TRITON_INTERPRET at import."""
    pytest.importorskip("triton")
    made = subprocess.run(
        [sys.executable, "-m", "helpers.rounds_cases", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert made.stdout.split() == ["8"] * 3, made.stderr

"""The measurement of the selection compares indices before it compares times."""

import pytest
import torch

from helpers.efficiency import run
from llava.analysis.efficiency import baseline
from llava.analysis.efficiency.__main__ import main


def test_rows_and_speedup(capsys):
    out, document = run(
        capsys,
        "selection --device cpu --vs baseline --repeats 1 --patches 100 --channels 32 --tokens 20,10 "
        "--batch-sizes 1,2",
    )
    assert [(row["batch"], row["tokens"]) for row in document["rows"]] == [(1, 20), (1, 10), (2, 20), (2, 10)]
    assert document["speedup"] == min(row["speedup"] for row in document["rows"]) and "speedup" in out
    for row in document["rows"]:
        assert row["equal_indices"] and row["baseline_gflops"] > row["optimized_gflops"] > 0


def test_different_indices_are_an_error(monkeypatch):
    monkeypatch.setattr(
        baseline, "baseline_select", lambda x, a, tokens, r: torch.zeros(len(x), tokens).long()
    )
    with pytest.raises(RuntimeError, match="indices differ"):
        main(["selection", "--device", "cpu", "--repeats", "1", "--patches", "40", "--tokens", "8"])


SMALL = "selection --device cpu --repeats 1 --patches 36 --channels 32 --tokens 9 --batch-sizes 1,2"


def test_all_methods_are_compared_with_vispruner_and_the_prefill(capsys):
    out, document = run(capsys, f"{SMALL} --methods all --dummy-model tiny --text-tokens 5")
    names = [row["method"] for row in document["rows"] if row["batch"] == 2]
    assert names == document["methods"] and {"vispruner", "cdpruner", "tome", "farthest"} <= set(names)
    assert not {"none", "fastv"} & set(names) and "x VisPruner" in out
    for row in document["rows"]:
        assert row["of_prefill"] > 0 and row["vs_vispruner"] > 0
        assert row["flops_of_prefill"] == pytest.approx(row["gflops"] / row["prefill_gflops"])
    gflops = {row["method"]: row["gflops"] for row in document["rows"] if row["batch"] == 1}
    assert gflops["uniform"] == 0 < gflops["vispruner"] < gflops["score"] < gflops["scope"]
    assert gflops["divprune"] == 36 * 37 * document["projected"] / 1e9


def test_some_methods(capsys):
    _, document = run(capsys, f"{SMALL} --methods scope mmr --dummy-model tiny")
    assert document["methods"] == ["scope", "mmr"] and len(document["rows"]) == 4


def test_long_rows_are_measured_with_and_without_the_matrix(monkeypatch, capsys):
    import json

    from llava.analysis.efficiency.__main__ import main
    from llava.pruning import base

    monkeypatch.setattr(base, "LARGEST", 100)
    options = ["--channels", "8", "--heads", "2", "--tokens", "4", "--repeats", "1", "--warmup", "0"]
    main(["selection", "--device", "cpu", "--n", "90,200", "--vs", "baseline", *options])
    table, _, last = capsys.readouterr().out.strip().rpartition("\n")
    short, long = json.loads(last)["long_rows"]
    assert "N x N MiB" in table and (short["patches"], long["patches"]) == (90, 200)
    assert "matrix" not in short  # it has the matrix anyway
    assert long["matrix_bytes"] == 8 * 200**2 and long["speedup"] > 0
    assert 0 < long["selection_peak_bytes"] < long["matrix_peak_bytes"]
    assert base.LARGEST == 100

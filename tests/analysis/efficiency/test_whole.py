"""The report on a whole model: its figures are consistent with each other and with the cost model."""

import pytest

from helpers.efficiency import run
from llava.analysis.efficiency import peak, stages, whole
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS
from llava.model import flops


@pytest.fixture
def report(capsys, monkeypatch):
    monkeypatch.setattr(peak, "matrix_rate", lambda device, dtype: 5e10)
    monkeypatch.setattr(peak, "bandwidth", lambda device: 1e10)
    out, document = run(
        capsys,
        "--dummy-model tiny --device cpu --vs baseline --repeats 1 --peak --warmup 0 --tokens none,64 "
        "--methods vispruner,fastervlm --new-tokens 2 --batch-size 2",
    )
    assert document["batch_size"] == 2 and document["dtype"] == "float32" and document["machine"]["torch"]
    assert "2 per multiply-accumulate" in out and document["kernels"]["tower"] == "sdpa"
    return document


def test_figures_are_consistent(report):
    rows = {(row["method"], row["tokens"]): row for row in report["rows"]}
    assert [*rows] == [("none", None), ("vispruner", 64), ("fastervlm", 64)]
    pruned, unpruned = rows["vispruner", 64], rows["none", None]
    assert (pruned["visual_tokens"], unpruned["visual_tokens"]) == (64, 576)
    shape = flops.LanguageShape.from_config(DUMMY_MODELS["tiny"].language)
    for row in rows.values():
        tokens = row["visual_tokens"] + 80
        assert row["kv_bytes"] == 2 * flops.kv_cache_bytes(tokens, shape, 4)  # measured against computed
        assert row["flops"]["language_model"] == 4 * flops.llm_prefill_macs(tokens, shape)
        assert set(row["stages"]) == set(whole.STAGES)
        assert row["first_token"]["median_ms"] > row["stages"]["prefill"]["fastest_ms"] / 2
        assert set(row["roofline"]) == {"vision", "prefill", "decoded_token"}
        vision = row["roofline"]["vision"]
        assert vision["roofline_ms"] == pytest.approx(row["flops"]["vision_tower"] / 5e7, rel=1e-3)
        spent = row["stages"]["vision"]["median_ms"]
        assert vision["times_roofline"] == pytest.approx(spent / vision["roofline_ms"], rel=1e-2)
        read = report["weights_bytes"]["language_model"] + row["kv_bytes"]
        assert row["roofline"]["decoded_token"]["roofline_ms"] == pytest.approx(read / 1e7, rel=1e-3)
    assert "baseline" not in rows["fastervlm", 64] and rows["fastervlm", 64]["flops"]["selection"] == 0
    parts = [value for part, value in pruned["flops"].items() if part != "total"]
    assert pruned["flops"]["total"] == sum(parts)
    speedup = pruned["baseline"]["median_ms"] / pruned["first_token"]["median_ms"]
    assert report["speedup"] == pruned["speedup"] == pytest.approx(speedup, rel=1e-2)
    assert unpruned["first_token_of_unpruned"] == 1


def test_graphs_are_measured_beside_eager_and_baseline(capsys, monkeypatch):
    load = stages.load_model

    def captured(args):
        model = load(args)
        model.set_runtime(graphs=True)  # on a CPU a stand-in
        return model

    monkeypatch.setattr(stages, "load_model", captured)
    command = (
        "--dummy-model tiny --device cpu --vs baseline --repeats 1 --warmup 0 --tokens none,64 --new-tokens 2"
    )
    out, document = run(capsys, command)
    assert document["runtime"] == {"graphs": True, "compiled": False}
    unpruned, pruned = document["rows"]
    times = [pruned[key]["median_ms"] for key in ("baseline", "first_token", "graph_first_token")]
    assert pruned["graph_of_eager"] == pytest.approx(times[2] / times[1], rel=1e-2)
    assert pruned["graph_speedup"] == pytest.approx(times[0] / times[2], rel=1e-2)
    assert unpruned["graph_first_token_of_unpruned"] == 1 and "not_captured" not in pruned
    assert all(title in out for title in ("graph TTFT", "baseline / graph", "graph TPOT"))
    out, document = run(capsys, f"{command} --no-graphs")
    assert "graph TTFT" not in out and "graph_first_token" not in document["rows"][0]

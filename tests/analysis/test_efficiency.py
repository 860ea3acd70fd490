"""The measuring commands: what they report is what happened, and wrong arguments are answered at once."""

import json
import subprocess
import sys
import time

import pytest
import torch

from llava.analysis.efficiency import peak, selection, tower, whole
from llava.analysis.efficiency.__main__ import COMMANDS, build_parser, main
from llava.analysis.efficiency.shapes import SHAPES, build_model, build_tower
from llava.analysis.efficiency.timing import compare, measure, peak_bytes
from llava.model import flops


def run(capsys, *argv):
    code = main([str(part) for part in argv])
    out = capsys.readouterr().out
    assert code == 0
    return out, json.loads(out.splitlines()[-1])


# --- clocks ----------------------------------------------------------------------------------------------
def test_things_compared_take_turns():
    order = []
    runs = {name: lambda n=name: order.append(n) for name in "ab"}
    spent = compare(runs, repeats=3, warmup=1)
    assert order == list("ababbaab")
    assert {(one.passes, one.warmup) for one in spent.values()} == {(3, 1)}


def test_medians_and_limits():
    waits = iter([0.0, 0.03, 0.0, 0.0])
    spent = measure(lambda: time.sleep(next(waits)), repeats=3)
    assert spent.median < 0.01 < 0.03 <= spent.slowest and spent.fastest <= spent.median
    limited = compare({"it": lambda: time.sleep(0.02)}, repeats=50, warmup=0, limit=0.01)
    assert limited["it"].passes == 1
    assert spent.processor < 0.01  # sleeping is no work
    with pytest.raises(ValueError, match="at least one pass"):
        measure(lambda: None, repeats=0)


def test_peak_memory_counts_what_lives_at_a_time():
    kib = 1024
    assert peak_bytes(lambda: torch.zeros(64 * kib, dtype=torch.uint8)) == pytest.approx(64 * kib, rel=0.01)

    def one_after_the_other():
        for _ in range(5):
            torch.zeros(256 * kib, dtype=torch.uint8)

    assert peak_bytes(one_after_the_other) == pytest.approx(256 * kib, rel=0.01)
    both = peak_bytes(lambda: (torch.zeros(256 * kib, dtype=torch.uint8), torch.zeros(256 * kib)))
    assert both == pytest.approx(5 * 256 * kib, rel=0.01)


# --- shapes ----------------------------------------------------------------------------------------------
def test_shapes_are_those_of_the_published_models():
    sevens = flops.LanguageShape(layers=32, width=4096, mlp=11008)
    thirteens = flops.LanguageShape(layers=40, width=5120, mlp=13824)
    for name, language, crops, patches in (
        ("llava-1.5-7b", sevens, 1, 576),
        ("llava-next-7b", sevens, 5, 576),
        ("video-llava-7b", sevens, 8, 256),
        ("llava-1.5-13b", thirteens, 1, 576),
    ):
        shape = SHAPES[name]
        assert (shape.crops, shape.patches) == (crops, patches)
        assert flops.LanguageShape.from_config(shape.language) == flops.LanguageShape(
            language.layers, language.width, language.mlp, language.width
        )
    assert {budget * 5 for budget in SHAPES["llava-next-7b"].budgets} == {640, 320, 160}


def test_models_by_shape_repeat_and_run_in_the_dtype_asked_for():
    one, again = (build_model("tiny", dtype="bfloat16", tower_dtype="float32", seed=3) for _ in range(2))
    assert one.dtype == torch.bfloat16 and one.get_vision_tower().dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not any(tensor.is_meta for tensor in [*one.parameters(), *one.buffers()])
    other = build_tower("tiny", seed=4)
    assert not torch.equal(next(other.parameters()), next(build_tower("tiny", seed=3).parameters()))
    shallow = build_tower("tiny", select_layer=1, seed=4)
    first = (other.layers()[0], shallow.layers()[0])
    assert len(shallow.layers()) == 1
    assert all(torch.equal(a, b) for a, b in zip(*(layer.parameters() for layer in first), strict=True))


def test_crops_of_every_shape_meet_the_model(capsys):
    """LLaVA-NeXT's five crops and Video-LLaVA's eight frames, before a language model of a toy's size."""
    from dataclasses import replace

    from llava.analysis.efficiency import load

    toy = SHAPES["tiny"]
    for name, full, budget, kept in (("llava-next-7b", 2880, 32, 160), ("video-llava-7b", 2048, 14, 112)):
        big = SHAPES[name]
        small = replace(
            big,
            language={**toy.language, "num_hidden_layers": 1},
            tower={**toy.tower, "num_hidden_layers": 2, "image_size": big.tower["image_size"]},
        )
        SHAPES["toy"] = small
        try:
            args = build_parser("whole").parse_args(
                [
                    "--shapes",
                    "toy",
                    "--device",
                    "cpu",
                    "--tokens",
                    f"none,{budget}",
                    "--repeats",
                    "1",
                    "--warmup",
                    "0",
                    "--new-tokens",
                    "1",
                    "--vs",
                    "plain",
                ]
            )
            model, processor = load.load(args)
            rows = load.Load.prepare(model, processor, args).measure(args)
        finally:
            del SHAPES["toy"]
        assert [row["visual_tokens"] for row in rows] == [full, kept]
        assert rows[1]["flops"]["vision_tower"] == rows[0]["flops"]["vision_tower"]
        assert rows[1]["flops"]["selection"] > 0 == rows[0]["flops"]["selection"]


# --- reports ---------------------------------------------------------------------------------------------
def test_the_whole_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(peak, "matrix_rate", lambda device, dtype: 5e10)
    monkeypatch.setattr(peak, "bandwidth", lambda device: 1e10)
    file = tmp_path / "report.json"
    out, document = run(
        capsys,
        "--shapes",
        "tiny",
        "--device",
        "cpu",
        "--vs",
        "plain",
        "--repeats",
        1,
        "--peak",
        "--warmup",
        0,
        "--tokens",
        "none,64",
        "--methods",
        "vispruner,fastervlm",
        "--new-tokens",
        2,
        "--batch-size",
        2,
        "--output",
        file,
    )
    assert json.loads(file.read_text()) == document
    assert document["batch_size"] == 2 and document["dtype"] == "float32" and document["machine"]["torch"]
    assert "2 per multiply-accumulate" in out and document["kernels"]["tower"] == "sdpa"
    rows = {(row["method"], row["tokens"]): row for row in document["rows"]}
    assert [*rows] == [("none", None), ("vispruner", 64), ("fastervlm", 64)]
    ours, whole_ = rows["vispruner", 64], rows["none", None]
    assert (ours["visual_tokens"], whole_["visual_tokens"]) == (64, 576)
    shape = flops.LanguageShape.from_config(SHAPES["tiny"].language)
    for row in rows.values():  # the cache as it lies in memory is what the shapes say
        assert row["kv_bytes"] == 2 * flops.kv_cache_bytes(row["visual_tokens"] + 80, shape, 4)
        assert row["flops"]["language_model"] == 4 * flops.llm_prefill_macs(row["visual_tokens"] + 80, shape)
        assert set(row["stages"]) == set(whole.STAGES)
        assert row["first_token"]["median_ms"] > row["stages"]["prefill"]["fastest_ms"] / 2
        assert set(row["floor"]) == {"vision", "prefill", "decoded_token"}
        vision = row["floor"]["vision"]
        assert vision["floor_ms"] == pytest.approx(row["flops"]["vision_tower"] / 5e7, rel=1e-3)
        spent = row["stages"]["vision"]["median_ms"]
        assert vision["times_floor"] == pytest.approx(spent / vision["floor_ms"], rel=1e-2)
        weights = document["weights_bytes"]["language_model"] + row["kv_bytes"]
        assert row["floor"]["decoded_token"]["floor_ms"] == pytest.approx(weights / 1e7, rel=1e-3)
    assert "plain" not in rows["fastervlm", 64] and rows["fastervlm", 64]["flops"]["selection"] == 0
    assert ours["flops"]["total"] == sum(value for part, value in ours["flops"].items() if part != "total")
    taken = ours["plain"]["median_ms"] / ours["first_token"]["median_ms"]
    assert document["ratio"] == ours["ratio"] == pytest.approx(taken, rel=1e-2)
    assert whole_["first_token_of_unpruned"] == 1


def test_selection_against_the_plain_way(capsys):
    out, document = run(
        capsys,
        "selection",
        "--device",
        "cpu",
        "--vs",
        "plain",
        "--repeats",
        1,
        "--patches",
        100,
        "--channels",
        32,
        "--tokens",
        "20,10",
        "--batch-sizes",
        "1,2",
    )
    assert [(row["batch"], row["tokens"]) for row in document["rows"]] == [(1, 20), (1, 10), (2, 20), (2, 10)]
    assert document["ratio"] == min(row["ratio"] for row in document["rows"]) and "plain / ours" in out
    for row in document["rows"]:
        assert row["equal_indices"] and row["plain_gflops"] > row["ours_gflops"] > 0


def test_selection_that_differs_is_an_error(monkeypatch):
    from llava.analysis.efficiency import plain

    monkeypatch.setattr(plain, "plain_select", lambda x, a, tokens, r: torch.zeros(len(x), tokens).long())
    with pytest.raises(RuntimeError, match="not the plain way's indices"):
        main(["selection", "--device", "cpu", "--repeats", "1", "--patches", "40", "--tokens", "8"])


def test_tower_against_the_plain_way(capsys):
    out, document = run(
        capsys, "tower", "--shapes", "tiny", "--device", "cpu", "--vs", "plain", "--repeats", 1
    )
    row, heads, tokens = document["rows"][0], 3, 577
    assert document["passes"] == 1 and "medians of 1 passes" in out
    assert document["ratio"] == pytest.approx(1 / document["ours_over_plain"], rel=1e-2)
    # attention of further layers: nothing here, a matrix per layer the plain way
    assert row["ours"]["peak_bytes_of_more_layers"] <= 0.05 * row["ours"]["peak_bytes"]
    layers = SHAPES["tiny"].tower["num_hidden_layers"]
    matrices = (layers - 1) * heads * tokens**2 * 4
    assert row["plain"]["peak_bytes_of_more_layers"] == pytest.approx(matrices, rel=0.15)


def test_peaks_are_measured(capsys):
    assert peak.matrix_rate("cpu", torch.float32, repeats=1) > 1e9
    _, document = run(capsys, "peak", "--device", "cpu", "--dtypes", "float32", "--repeats", 1)
    assert document["bytes_per_second"] > 1e8 and [*document["matrix_flops_per_second"]] == ["float32"]


# --- command line ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "argv, says",
    [
        (["--shapes", "llava-2b"], "invalid choice"),
        (["--model", "/nowhere"], "no config.json"),
        (["--shapes", "tiny", "--methods", "visprune"], "visprune"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--device", "abacus"], "no such device"),
        (["selection", "--tokens", "900"], "nothing to choose"),
        (["selection", "--batch-sizes", "0"], "numbers from 1"),
        (["tower", "--repeats", "0"], "expected a number >= 1"),
        (["peak", "--dtypes", "int8"], "no such dtype"),
        (["--image", "/no.jpg"], "no such file"),
        (["table", "--output", "/no/where.json"], "there is no folder"),
    ],
)
def test_wrong_arguments(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_unknown_parts_are_named(capsys):
    assert main(["towers"]) == 2
    error = capsys.readouterr().err
    assert "towers" in error and all(name in error for name in COMMANDS)


def test_help_is_quick_and_names_the_parts():
    code = (
        "import sys, llava.analysis.efficiency.__main__ as m\ntry: m.main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.stdout.splitlines()[-1] == "False", made.stdout + made.stderr
    assert all(name in made.stdout for name in COMMANDS)


def test_every_part_has_what_the_dispatcher_asks_for():
    for name, module in (("selection", selection), ("tower", tower), ("peak", peak), ("whole", whole)):
        assert module.__doc__ in build_parser(name).format_help() and callable(module.run)

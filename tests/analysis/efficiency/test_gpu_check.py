"""The check of a GPU, rehearsed on a CPU: parts fail, stop and resume alone, and the report has every row."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers.efficiency import run
from llava.analysis.efficiency import gpu_check, gpu_context, gpu_report
from llava.analysis.efficiency.__main__ import main
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS, build_model
from llava.analysis.efficiency.gpu_check import PARTS, run_part
from llava.analysis.efficiency.gpu_context import NotMeasuredError
from llava.analysis.efficiency.gpu_parts import FUNCTIONS, read_junit
from llava.analysis.efficiency.gpu_stages import covered
from llava.analysis.efficiency.prefix import merged_attention

RELEASES = []
CONTEXT = SimpleNamespace(release=lambda: RELEASES.append(1))


def part_of(*steps):
    """Return a part with these measurements; an exception is raised by its measurement."""

    def measure(value):
        if isinstance(value, Exception):
            raise value
        return value

    def part(_context):
        for name, value in steps:
            yield name, lambda value=value: measure(value)

    return part


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu_and_its_report_has_every_row(capsys, tmp_path, monkeypatch):
    tiny = DUMMY_MODELS["tiny"]
    small = replace(
        tiny, tower={**tiny.tower, "hidden_size": 96}, language={**tiny.language, "hidden_size": 128}
    )
    monkeypatch.setitem(DUMMY_MODELS, "tiny", small)
    folder = tmp_path / "gpu"
    out, document = run(capsys, f"gpu_check --device cpu --shapes tiny --limit 600 --output {folder}")
    assert document["failed"] == [] and [*document["parts"]] == [*PARTS]
    assert all(part["state"] == "done" for name, part in document["parts"].items() if name != "tests")
    assert document["parts"]["tests"]["state"] == "not run"
    report = (folder / gpu_check.REPORT).read_text()
    for goal in gpu_report.GOALS:
        assert goal.name in report and goal.name in out
    measured = [one for one in document["goals"] if one["value"] is not None]
    assert len(measured) == len(gpu_report.GOALS) - 5
    assert {one["reason"] for one in document["goals"]} >= {
        "tests: no card: the device is a CPU",
        "engine: no card: the device is a CPU",
        "first-token-1.5: there is no measurement 'batch 8'",
    }
    for title in ("What pruning buys", "First token, LLaVA-NeXT", "Tower, ms", "Engine", "shared prefix"):
        assert title in report
    one = document["parts"]["first-token-1.5"]["measurements"]["64"]
    assert one["equal_first_token"] and one["visual_tokens"] == 64
    assert one["graphs"] > 0 and "not_captured" not in one
    assert document["parts"]["engine"]["measurements"]["flips"]["eager_against_graphs"] == 0
    assert json.loads((folder / gpu_check.RESULTS).read_text())["goals"] == document["goals"]

    def never(_context):
        raise AssertionError("measured again")
        yield

    for name in PARTS:  # a second call keeps everything that was measured
        monkeypatch.setitem(FUNCTIONS, name, never if name != "tests" else part_of(("tests", {"passed": 3})))
    _, again = run(capsys, f"gpu_check --device cpu --shapes tiny --limit 600 --output {folder}")
    assert again["parts"]["engine"] == document["parts"]["engine"]
    assert again["parts"]["tests"]["state"] == "done" and again["goals"][0]["value"] == 3
    assert {one["met"] for one in again["goals"]} == {None}  # a CPU meets no goal of a GPU


def test_a_failed_measurement_leaves_the_others_and_is_measured_again(capfd):
    part = part_of(("a", {"x": 1}), ("b", RuntimeError("no kernel")), ("c", {"x": 3}))
    record = run_part(part, CONTEXT, {}, 60)
    assert record["measurements"] == {"a": {"x": 1}, "c": {"x": 3}} and record["state"] == "incomplete"
    assert [*record["errors"]] == ["b"] and record["errors"]["b"].startswith("RuntimeError: no kernel (")
    assert record["reason"].startswith("1 failed: RuntimeError: no kernel")
    assert "no kernel" in capfd.readouterr().err
    again = run_part(part_of(("a", AssertionError()), ("b", {"x": 2})), CONTEXT, record, 60)
    assert again["state"] == "done" and again["errors"] == {} and again["reason"] is None
    assert [*again["measurements"]] == ["a", "c", "b"]


def test_a_part_that_cannot_be_prepared_is_reported(capfd):
    def part(_context):
        raise ValueError("no such model")
        yield

    record = run_part(part, CONTEXT, {}, 60)
    assert record["errors"]["preparation"].startswith("ValueError: no such model (")
    document = {"parts": {"memory": record}}
    with pytest.raises(gpu_report.Unmeasured, match="no such model"):
        gpu_report.measured(document, "memory", "none")
    with pytest.raises(gpu_report.Unmeasured, match="part decode was not run"):
        gpu_report.measured(document, "decode", "none")


def test_what_cannot_be_measured_here_is_no_error():
    part = part_of(("a", {"x": 1}), ("b", NotMeasuredError("no card")))
    record = run_part(part, CONTEXT, {}, 60)
    assert (record["state"], record["errors"], record["not_measured"]) == ("done", {}, {"b": "no card"})
    record = run_part(part_of(("b", NotMeasuredError("no card"))), CONTEXT, {}, 60)
    assert (record["state"], record["reason"]) == ("not run", "no card")


def test_no_measurement_starts_after_the_limit_of_a_part(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    RELEASES.clear()
    record = run_part(part_of(("a", {}), ("b", {}), ("c", {})), CONTEXT, {}, 15)
    assert [*record["measurements"]] == ["a"] and record["state"] == "incomplete"
    assert record["reason"] == "time: stopped after 20 s before b" and RELEASES == [1]


def test_parts_that_do_not_fit_are_not_run_and_results_of_other_machines_are_moved(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setitem(FUNCTIONS, "peak", part_of(("copy", {"bytes_per_second": 1.0})))
    command = f"gpu_check peak --device cpu --shapes tiny --output {tmp_path}"
    _, document = run(capsys, f"{command} --limit 0")
    assert document["parts"]["peak"]["state"] == "not run" and "time" in document["parts"]["peak"]["reason"]
    _, document = run(capsys, f"{command} --limit 1e9")
    assert document["parts"]["peak"]["measurements"] == {"copy": {"bytes_per_second": 1.0}}
    monkeypatch.setitem(FUNCTIONS, "peak", part_of(("copy", {"bytes_per_second": 2.0})))
    _, document = run(capsys, f"{command} --limit 1e9")
    assert document["parts"]["peak"]["measurements"]["copy"]["bytes_per_second"] == 1.0
    _, document = run(capsys, f"{command} --limit 1e9 --again")
    assert document["parts"]["peak"]["measurements"]["copy"]["bytes_per_second"] == 2.0
    results = tmp_path / gpu_check.RESULTS
    changed = {**document, "environment": {**document["environment"], "torch": "1.0"}}
    results.write_text(json.dumps(changed))
    monkeypatch.setitem(FUNCTIONS, "peak", part_of(("copy", RuntimeError("lost"))))
    assert main([*command.split(), "--limit", "1e9"]) == 1  # a measurement failed
    assert "moved to" in capsys.readouterr().err
    assert json.loads((tmp_path / gpu_check.PREVIOUS).read_text()) == changed
    assert json.loads(results.read_text())["parts"]["peak"]["measurements"] == {}
    results.write_text(json.dumps({**changed, "environment": {"name": "a third machine"}}))
    assert main([*command.split(), "--limit", "0"]) == 0
    assert json.loads((tmp_path / gpu_check.PREVIOUS).read_text()) == changed  # nothing is lost
    assert len(list(tmp_path.glob("*previous*"))) == 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["towers"], "unknown part 'towers'"),
        (["--limit", "-1"], "--limit"),
        (["--device", "cuda:99"], "CUDA devices"),
    ],
)
def test_invalid_arguments(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(["gpu_check", *argv])
    assert message in capsys.readouterr().err


RECORD = {
    "state": "done",
    "reason": None,
    "seconds": 1.0,
    "measurements": {"copy": {"bytes_per_second": 1.0}},
    "errors": {},
    "not_measured": {},
}


@pytest.mark.parametrize(
    "peak",
    [
        3,
        None,
        {},
        {**RECORD, "state": 1},
        {**RECORD, "seconds": "long"},
        {**RECORD, "measurements": [1]},
        {**RECORD, "measurements": {"copy": 1}},
        {**RECORD, "errors": None},
        {key: value for key, value in RECORD.items() if key != "not_measured"},
    ],
)
def test_corrupt_results_are_refused_before_anything_is_measured(peak, tmp_path, capsys):
    command = ["gpu_check", "peak", "--device", "cpu", "--output", str(tmp_path)]
    document = {"environment": {}, "parts": {"peak": RECORD, "tower": peak}}
    (tmp_path / gpu_check.RESULTS).write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        main(command)
    assert "not a result of this command" in capsys.readouterr().err
    document["parts"].pop("tower")
    (tmp_path / gpu_check.RESULTS).write_text(json.dumps(document))
    assert gpu_check.read_results(tmp_path / gpu_check.RESULTS) == document


@pytest.mark.skipif(gpu_check.fcntl is None, reason="no POSIX locks")
def test_two_at_once_do_not_measure_each_other(tmp_path, capsys):
    command = ["gpu_check", "peak", "--device", "cpu", "--output", str(tmp_path)]
    with gpu_check._alone(tmp_path):
        assert main(command) == 1
    assert "another gpu_check writes to this folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_no_measurement(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setitem(FUNCTIONS, "peak", lambda context: iter([("copy", lambda: measured.append(1))]))
    (tmp_path / gpu_check.REPORT).mkdir()
    assert main(["gpu_check", "peak", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "report.md" in capsys.readouterr().err and not measured


def test_foreign_files_are_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / gpu_check.RESULTS).write_text("[1]")
    with pytest.raises(SystemExit):
        main(["gpu_check", "--device", "cpu", "--output", str(tmp_path)])
    assert "not a result of this command" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["gpu_check", "--device", "cpu", "--output", str(tmp_path / gpu_check.RESULTS)])
    assert "not a folder" in capsys.readouterr().err


def test_outcomes_of_tests_are_counted(tmp_path):
    report = tmp_path / "report.xml"
    case = '<testcase classname="a" name="{}">{}</testcase>'
    passed, skipped = case.format("x", ""), case.format("y", '<skipped message="no card"/>')
    report.write_text(f"<testsuites><testsuite>{passed}{skipped}</testsuite></testsuites>")
    assert read_junit(report) == {"passed": 1, "skipped": ["a::y"]}
    report.write_text(f"<testsuite>{passed}{case.format('z', '<failure/>')}</testsuite>")
    with pytest.raises(RuntimeError, match=r"1 of 2 tests failed: \['a::z'\]"):
        read_junit(report)
    report.write_text(f"<testsuite>{skipped}</testsuite>")
    with pytest.raises(RuntimeError, match="no test ran"):
        read_junit(report)


def test_overlapping_intervals_are_counted_once():
    assert covered([]) == 0
    assert covered([(5, 8), (0, 3), (2, 4), (6, 7), (8, 9)]) == 8


def test_goals_read_the_parts_of_a_card():
    times = {"none": 10.0, "128": 8.0, "64": 6.0, "32": 12.0}
    steps = {
        name: {"tokens": None if name == "none" else int(name), "graph": {"median_ms": value}}
        for name, value in times.items()
    }
    batch = {"batch": 8, **{name: {"median_ms": value} for name, value in times.items()}}
    steps["none"]["baseline"] = {"median_ms": 20.0}
    part = {"state": "done", "measurements": {**steps, "batch 8": batch}, "errors": {}, "not_measured": {}}
    document = {
        "parts": {"first-token-1.5": {**part, "reason": None}},
        "environment": {"device": "cuda"},
        "budgets": {form: [128, 64, 32] for form in ("1.5", "next")},
    }
    found = {one["goal"]: one for one in gpu_report.goals(document)}
    first = found["first token, LLaVA-1.5, 64 of 576 tokens, over the unpruned baseline"]
    assert first["value"] == pytest.approx(0.3) and first["met"] and first["target"] == "<= 0.36"
    for number in (1, 8):
        slowest = found[f"first token, slowest budget over unpruned, batch {number}"]
        assert slowest["value"] == pytest.approx(1.2) and slowest["met"] is False
    assert found["first token, slowest budget over unpruned, batch 32"]["met"] is None


def test_merged_attention_equals_attention_over_copies():
    torch.manual_seed(0)
    shared = torch.randn(2, 1, 3, 7, 8)
    own = torch.randn(2, 4, 3, 5, 8)
    for queries in (5, 1):
        q = torch.randn(4, 3, queries, 8)
        keys, values = (torch.cat([a.expand(4, -1, -1, -1), b], 2) for a, b in zip(shared, own, strict=True))
        mask = torch.ones(queries, 12, dtype=torch.bool).tril(12 - queries)
        expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        found = merged_attention(q, tuple(shared), tuple(own))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_models_share_weights_of_equal_shape():
    one = build_model("tiny", seed=1)
    context = gpu_context.CheckContext("cpu", DUMMY_MODELS["tiny"], 1, 1)
    other = build_model(context.sizes("video"), seed=1, share=dict(one.named_parameters()))
    assert other.lm_head.weight.data_ptr() == one.lm_head.weight.data_ptr()
    names = [name for name, _ in one.named_parameters() if name.endswith("position_embedding.weight")]
    assert names and all(one.get_parameter(name).shape != other.get_parameter(name).shape for name in names)

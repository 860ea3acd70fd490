"""Everything in one command: the plan, what is skipped, failures, and the report; the steps are made up."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path

import pytest

from llava.eval import paper
from llava.eval.jobs import steps
from llava.eval.paper import PaperStep, Setup, main, plan
from llava.eval.tables.__main__ import build_parser, choose_tables
from llava.paths import BUNDLED_DATA
from llava.pruning import list_pruners

TABLES = paper._tables
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
DRAW = f"""#!/usr/bin/env bash
OUT_DIR=$OUT_DIR/$(basename "$(dirname "$0")")/$(basename "$0" .sh)
mkdir -p "$OUT_DIR"
echo "$*" > "$OUT_DIR/arguments.csv"
echo '{SVG}' > "$OUT_DIR/fig.svg"
cp "$(dirname "$0")/../text.md" "$OUT_DIR/ratio.md"
"""
TEXT = (
    "# Ratio\n\nWhat \\*came\\* out.\n\n| r | F1 |\n|---|--:|\n| 0.5 | **95.0** |\n\n```\nraw <text>\n```\n"
)


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repository with two ablations, of which one fails, a helper, and no figure."""
    root = tmp_path / "repo"
    for name, text in [
        ("ablation/ratio", DRAW),
        ("ablation/broken", "echo it broke; exit 3"),
        ("ablation/_h", ""),
    ]:
        path = root / "scripts" / f"{name}.sh"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "scripts" / "text.md").write_text(TEXT)
    monkeypatch.setattr(paper, "REPOSITORY", root)
    monkeypatch.setattr(steps, "code_hash", lambda: "code")

    def sweeps(setup):
        folder = setup.output / "scores" / "tiny"
        command = (
            "bash",
            "-c",
            f"echo run >> {tmp_path}/ran; mkdir -p {folder}; echo '{{}}' > {folder}/score.json",
        )
        return [PaperStep(steps.Step("scores/tiny", "Sweep", command, folder))]

    def quiet(name):
        def step(setup):
            folder = setup.output / name
            return steps.Step(name, name, ("bash", "-c", f"touch {folder}/a.csv"), folder)

        return step

    monkeypatch.setattr(paper, "_bundled_sweeps", sweeps)
    for name in ("selection", "efficiency"):
        monkeypatch.setattr(paper, f"_{name}", quiet(name))
    monkeypatch.setattr(paper, "_methods", lambda setup, sweep: quiet("methods")(setup))
    monkeypatch.setattr(paper, "_flips", lambda setup, sweep: quiet("flips")(setup))
    monkeypatch.setattr(paper, "_tables", quiet("published"))
    monkeypatch.delenv("CKPT_DIR", raising=False)
    monkeypatch.delenv("DATA_DIR", raising=False)
    return root


def run(tmp_path, capsys, *arguments):
    code = main(["--output", str(tmp_path / "out"), *arguments])
    out = capsys.readouterr().out
    return code, json.loads(out.splitlines()[-1]), out


def test_list_runs_nothing(repo, tmp_path, capsys):
    code, document, out = run(tmp_path, capsys, "--list")
    names = ["scores/tiny", "ablation/broken", "ablation/ratio", "selection", "methods", "flips"]
    names += ["efficiency", "published"]
    assert code == 0 and [line["step"] for line in document["plan"]] == names
    assert {line["step"]: line["state"] for line in document["plan"]}["flips"] == "to run"
    assert "Ablation: ratio" in out and document["free"] > 0
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out" / "index.html").exists()


def test_a_failure_does_not_stop_the_others_and_is_in_the_report(repo, tmp_path, capsys):
    code, document, _ = run(tmp_path, capsys)
    assert code == 1 and document["failed"] == ["ablation/broken"] and document["ran"] == 8
    page = (tmp_path / "out" / "index.html").read_text()
    assert "it broke; exit code 3" in page and "What *came* out." in page and "raw &lt;text&gt;" in page
    assert page.count("data:image/svg+xml;base64,") == 1 and ">arguments.csv</a>" in page
    assert "What was measured on what" in page and steps.machine() in page
    assert ' strong">95.0</td>' in page
    code, document, _ = run(tmp_path, capsys)  # only what failed
    assert code == 1 and document["ran"] == 1 and (tmp_path / "ran").read_text() == "run\n"
    (repo / "scripts" / "ablation" / "broken.sh").write_text(DRAW)
    code, document, _ = run(tmp_path, capsys)
    assert (code, document["failed"], document["ran"]) == (0, [], 1)
    code, document, _ = run(tmp_path, capsys)
    assert (document["ran"], document["seconds"] < 2) == (0, True)


def test_new_scripts_are_found_and_quick_runs_are_short(repo, tmp_path, capsys):
    figures = repo / "scripts" / "figures"
    figures.mkdir()
    (figures / "fig3.sh").write_text(DRAW)
    _, document, _ = run(tmp_path, capsys, "--quick")
    assert document["steps"]["figures/fig3"] == "done"
    written = tmp_path / "out" / "figures" / "fig3" / "arguments.csv"
    assert written.read_text() == "--limit 36\n"
    assert "A quick run" in (tmp_path / "out" / "index.html").read_text()
    assert plan(Setup(tmp_path))[3].step.command[2:] == ()


def test_an_interruption_writes_the_report_and_resumes(repo, tmp_path, capsys, monkeypatch):
    script = repo / "scripts" / "ablation" / "broken.sh"
    script.write_text("kill -INT $PPID; sleep 30")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(["--output", str(tmp_path / "out")]) == 130
    page = (tmp_path / "out" / "index.html").read_text()
    assert "to run: not run yet" in page
    script.write_text(DRAW)
    code, document, _ = run(tmp_path, capsys)
    assert code == 0 and document["ran"] == 7 and (tmp_path / "ran").read_text() == "run\n"


def test_the_plan_of_the_bundled_models(tmp_path):
    every = {one.step.name: one for one in plan(Setup(tmp_path))}
    sweep = every["scores/llava-tiny"]
    words = list(sweep.step.command)
    methods = words[words.index("--methods") + 1].split(",")
    assert sorted(methods) == list_pruners() and methods[0] == "none"
    assert words[words.index("--tokens") + 1] == "128,64,32" and "--limit" not in words
    assert words[words.index("--benchmarks") + 1].split(",")[:2] == ["vqav2_val", "gqa"]
    assert sweep.questions == 6080 and sweep.settings > 10 and sweep.timing is not None
    assert sweep.timing.environment == {
        "VISPRUNER_VISION_CACHE": "0"
    }  # with a full cache it would time nothing
    assert {"scores/llava-tiny-anyres", "tables/efficiency", "tables/published", "flips"} <= every.keys()
    assert {"selection", "methods"} <= every.keys()
    assert every["flips"].step.command[-1].endswith("flips.png")  # the overlay writes one file
    assert "--verdict" not in every["tables/published"].step.command
    short = plan(Setup(tmp_path, quick=True))[0]
    assert short.questions < 400 and "--limit" in short.step.command


def test_an_estimate_follows_from_the_timing(tmp_path):
    runner = steps.StepRunner(tmp_path / "steps")
    answers = tmp_path / "answers.jsonl"
    answers.write_text("x" * 600)
    cells = [
        {"speed": {"own_seconds": s, "generated": 10}, "answers_file": str(answers), "answered": 2}
        for s in (5, 1)
    ]
    document = {"tables": [{"cells": cells, "vision": {"seconds": 6.0, "images": 3}}]}
    timing = steps.Step("timing/m", "t", ("true",), tmp_path)
    (tmp_path / "steps" / "timing").mkdir(parents=True)
    (tmp_path / "steps" / "timing" / "m.log").write_text("text\n" + json.dumps(document))
    step = steps.Step("scores/m", "s", ("true",), tmp_path / "out")
    # 7 images of 2 s; 100 questions of 0.5 s with all tokens and three times 0.1 s pruned
    assert paper.estimate(runner, PaperStep(step, timing, 7, 100, 4)) == pytest.approx(
        (14 + 50 + 30, 100 * 4 * 300)
    )
    document["tables"][0]["vision"] = {}  # of a timing that had nothing to do
    (tmp_path / "steps" / "timing" / "m.log").write_text(json.dumps(document))
    assert paper.estimate(runner, PaperStep(step, timing, 7, 100, 4)) == (None, 0.0)
    assert paper.estimate(runner, PaperStep(step)) == (None, 0.0)


def test_published_checkpoints_and_data_decide_the_plan(tmp_path):
    for name in ("llava-v1.5-7b", "llava-v1.5-13b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    every = {one.step.name: one for one in plan(Setup(tmp_path / "out", False, tmp_path, BUNDLED_DATA))}
    words = list(every["scores/llava-1.5-7b"].step.command)
    assert words[words.index("--preset") + 1] == "published" and str(tmp_path / "llava-v1.5-7b") in words
    assert words[words.index("--ratios") + 1] == "0.5" and words[words.index("--tokens") + 1] == "128,64,32"
    before = list(every["scores/fastervlm-llava-1.5-7b"].step.command)
    assert before[before.index("--tokens") + 1] == "432,288,144,58,29"
    assert "none" not in before[before.index("--methods") + 1].split(",")  # measured by the sweep above
    large = list(every["scores/fastervlm-llava-1.5-13b"].step.command)
    assert {"none", "fastervlm"} <= set(large[large.index("--methods") + 1].split(","))
    assert "llava-v1.6-vicuna-7b" in every["scores/llava-next-7b"].step.missing
    assert "--verdict" in every["tables/published"].step.command
    (tmp_path / "data").mkdir()
    empty = plan(Setup(tmp_path / "out", False, tmp_path, tmp_path / "data"))
    assert all("no data" in one.step.missing or "no checkpoint" in one.step.missing for one in empty[:5])


@pytest.mark.parametrize(
    "checkpoints, data, message",
    [
        (".", None, "DATA_DIR: not set"),
        (None, ".", "CKPT_DIR: not set"),
        ("none", ".", "CKPT_DIR: no such folder"),
        (".", ".", "none of the published checkpoints is there (llava-v1.5-7b"),
    ],
)
def test_wrong_folders_are_named(checkpoints, data, message, tmp_path, monkeypatch, capsys):
    for name, value in (("CKPT_DIR", checkpoints), ("DATA_DIR", data)):
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    assert main(["--list", "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_it_ends_in_a_verdict(repo, tmp_path, monkeypatch, capsys):
    setup = Setup(tmp_path / "out", False, tmp_path, tmp_path)
    words = [word for word in TABLES(setup).command if not word.endswith((".py", "python"))]
    args = build_parser().parse_args(words[words.index("llava.eval.tables") + 1 :])
    assert args.verdict and args.results == [setup.output / "scores"]
    assert {"other-vlms", "fastervlm-llava-1.5-13b", "others-visco-1-token"} <= {
        table.name for table in choose_tables(args.table)
    }
    verdict = json.dumps({"verdict": {"counts": {"inside": 1, "missing": 55}}})
    command = ("bash", "-c", f"touch {tmp_path}/out/p/a.csv; echo text; echo '{verdict}'")
    last = PaperStep(steps.Step("published", "Published", command, setup.output / "p"))
    monkeypatch.setattr(paper, "plan", lambda given: [last])
    monkeypatch.setattr(paper, "_setup", lambda args: setup)
    code, document, out = run(tmp_path, capsys)
    assert code == 0 and document["verdict"] == {"inside": 1, "missing": 55}
    assert "verdict: inside: 1; missing: 55" in out
    assert "The verdict on every published number" in (setup.output / "index.html").read_text()


def test_two_runs_do_not_share_a_folder(repo, tmp_path, capsys):
    with steps.StepRunner(Path(tmp_path / "out" / "steps")).alone():
        assert main(["--output", str(tmp_path / "out")]) == 1
    assert "in use by another process" in capsys.readouterr().err

"""The command line: invalid arguments are refused before anything is loaded, and former names still work."""

import json
import subprocess
import sys

import pytest

from helpers.efficiency import run
from llava.analysis.efficiency.__main__ import COMMANDS, build_parser, main, with_former_keys


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dummy-model", "llava-2b"], "invalid choice"),
        (["--vs", "nothing"], "invalid choice"),
        (["--model", "/nowhere"], "no config.json"),
        (["--dummy-model", "tiny", "--methods", "visprune"], "visprune"),
        (["--dummy-model", "tiny", "--methods", "fastv"], "'fastv' prunes inside the language model"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--device", "abacus"], "no such device"),
        (["selection", "--tokens", "900"], "fewer than --patches"),
        (["selection", "--batch-sizes", "0"], "integers >= 1"),
        (["selection", "--methods", "scop"], "did you mean 'scope'"),
        (["selection", "--methods", "scope", "--vs", "baseline"], "not with --vs baseline"),
        (["tower", "--repeats", "0"], "--repeats"),
        (["peak", "--dtypes", "int8"], "unknown dtype 'int8'"),
        (["--image", "/no.jpg"], "no such file"),
        (["--dummy-model", "tiny", "--device", "cpu", "--compile"], "compiled layers need a CUDA device"),
        (["engine", "--device", "cpu", "--compile"], "compiled layers need a CUDA device"),
        (["table", "--output", "/no/where.json"], "there is no folder"),
    ],
)
def test_invalid_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, former, current",
    [
        ("whole", "--shapes tiny --vs plain", "--dummy-model tiny --vs baseline"),
        ("tower", "--shapes tiny --limit 3", "--dummy-model tiny --max-seconds 3"),
        ("engine", "--pictures 3 --plain-questions 4", "--num-images 3 --baseline-questions 4"),
    ],
)
def test_former_options_are_aliases(command, former, current):
    parser = build_parser(command)
    assert parser.parse_args(former.split()) == parser.parse_args(current.split())


def test_former_keys_of_documents_are_aliases(capsys, tmp_path):
    file = tmp_path / "report.json"
    command = "selection --device cpu --vs plain --repeats 1 --patches 30 --channels 4 --tokens 8"
    _, document = run(capsys, command, "--output", file)
    assert json.loads(file.read_text()) == document
    row = document["rows"][0]
    assert document["ratio"] == document["speedup"] and row["ratio"] == row["speedup"]
    assert row["ours"] == row["optimized"] and row["plain_gflops"] == row["baseline_gflops"]
    assert with_former_keys({"roofline": {"times_roofline": 2}, "important_ratio": 1}) == {
        "roofline": {"times_roofline": 2, "times_floor": 2},
        "floor": {"times_roofline": 2, "times_floor": 2},
        "important_ratio": 1,
    }


def test_unknown_subcommands_are_named(capsys):
    assert main(["towers"]) == 2
    error = capsys.readouterr().err
    assert "towers" in error and all(name in error for name in COMMANDS)


def test_help_is_quick_and_names_the_subcommands():
    code = (
        "import sys, llava.analysis.efficiency.__main__ as m\ntry: m.main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.stdout.splitlines()[-1] == "False", made.stdout + made.stderr
    assert all(name in made.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", ["whole", *COMMANDS])
def test_every_subcommand_has_a_parser(command):
    assert "--output" in build_parser(command).format_help()

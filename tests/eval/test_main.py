"""`vispruner COMMAND`: the commands of the package under one name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval import score
from llava.eval.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
POPE = ROOT / "tests" / "data" / "benchmarks" / "pope"


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom llava.eval.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'PIL', 'llava.eval.cli'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: vispruner ")
    for name, (_, what) in COMMANDS.items():
        assert f"  {name:<12}{what}\n" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_has_its_help(name, capsys):
    module = COMMANDS[name][0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not part of this version")
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: python -m {module.removesuffix('.__main__')} " in capsys.readouterr().out


def test_every_module_with_a_command_line_is_listed():
    """All of `llava.eval` and `llava.analysis` but LLaVA's names, which docs/from_llava.md lists."""
    listed = {module.removesuffix(".__main__") for module, _ in COMMANDS.values()}
    for folder in ("eval", "analysis"):
        for path in (ROOT / "llava" / folder).glob("*.py"):
            name = f"llava.{folder}.{path.stem}"
            llavas = path.stem.startswith(("model_vqa", "eval_", "run_llava", "m4c"))
            if "def main(" in path.read_text(encoding="utf-8") and path.stem != "__main__" and not llavas:
                assert name in listed


def test_a_command_is_the_module(capsys):
    command = ["--benchmark", "pope", "--data", str(POPE)]
    command += ["--answers", str(POPE / "llava_answers_clean.jsonl")]
    assert score.main(command) == 0
    expected = capsys.readouterr()
    assert main(["score", *command]) == 0
    assert capsys.readouterr() == expected
    assert main(["score", *command[:-1], "gone.jsonl"]) == 1
    assert capsys.readouterr().err == "error: gone.jsonl: no such answer file\n"


@pytest.mark.parametrize(
    "argv, says",
    [
        (["rum"], "invalid choice: 'rum' (choose from "),
        ([], "the following arguments are required: COMMAND"),
        (["--benchmark", "pope"], "invalid choice: 'pope'"),
        (["score"], "the following arguments are required: --benchmark"),
    ],
)
def test_what_is_not_a_command(argv, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and says in capsys.readouterr().err

"""Run `python -m llava.analysis.efficiency` in this process."""

import json

from llava.analysis.efficiency.__main__ import main


def run(capsys, command, *more):
    """Run a command line; returns its output and the JSON document of its last line."""
    code = main([*command.split(), *map(str, more)])
    out = capsys.readouterr().out
    assert code == 0
    return out, json.loads(out.splitlines()[-1])

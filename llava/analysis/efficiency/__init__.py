"""Efficiency: time, memory and FLOPs, compared with a naive baseline and with the limits of the machine.

    python -m llava.analysis.efficiency --dummy-model tiny --device cpu --vs baseline     # the whole model
    python -m llava.analysis.efficiency selection --device cpu --vs baseline              # one part of it

A subcommand is a module of this folder with `add_arguments(parser)`, `run(args) -> dict` and, if it prints
tables, `render(document) -> str`; `check(args)` may refuse arguments (ValueError) before anything is loaded.
The naive baseline is in `baseline.py`.
"""

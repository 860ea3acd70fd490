"""How long it takes, how much memory, and how far that is from what the machine could do.

    python -m llava.analysis.efficiency --shapes tiny --device cpu --vs plain      # the whole model
    python -m llava.analysis.efficiency selection --device cpu --vs plain          # one part of it

A subcommand is a module of this folder with `add_arguments(parser)`, `run(args) -> dict` and, where it has
tables to show, `render(document) -> str`; `check(args)` may refuse arguments (ValueError) before anything is
loaded. "The plain way" that everything is set beside is in `plain.py`.
"""

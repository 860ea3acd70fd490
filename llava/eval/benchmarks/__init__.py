"""The benchmarks by name: one file each, one protocol (`base.Benchmark`), one registry.

    from llava.eval.benchmarks import get_benchmark
    pope = get_benchmark("pope")

To add one, write its file and name it in `_MODULES`. No benchmark is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module

from llava.eval.benchmarks.base import Benchmark, DataError, Problem, Question, Score, Tallies

__all__ = [
    "Benchmark", "DataError", "Problem", "Question", "Score", "Tallies", "get_benchmark", "list_benchmarks",
]

# name on the command line -> (module, class)
_MODULES = {
    "pope": ("llava.eval.benchmarks.pope", "Pope"),
}


def list_benchmarks() -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted(_MODULES)


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name (lower case). Raises ValueError that lists the names there are."""
    if name not in _MODULES:
        raise ValueError(f"unknown benchmark {name!r}; there are: {', '.join(list_benchmarks())}")
    module, class_name = _MODULES[name]
    return getattr(import_module(module), class_name)()

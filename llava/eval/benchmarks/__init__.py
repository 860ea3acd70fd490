"""Registry of benchmarks: one file each, one protocol (`base.Benchmark`).

    from llava.eval.benchmarks import get_benchmark
    pope = get_benchmark("pope")

To add one, see docs/add_a_benchmark.md. A benchmark is imported when it is requested.
"""

from __future__ import annotations

from importlib import import_module

from llava.eval.benchmarks.base import Benchmark, PerImageCounts, QuestionScore, Score
from llava.eval.benchmarks.files import Answer, DataError, DataIssue, Question
from llava.eval.benchmarks.joining import EmptyAnswersError

__all__ = [
    "Answer",
    "Benchmark",
    "DataError",
    "DataIssue",
    "EmptyAnswersError",
    "PerImageCounts",
    "Question",
    "QuestionScore",
    "Score",
    "benchmark_name",
    "get_benchmark",
    "list_benchmarks",
]

# name on the command line -> (module, class)
_MODULES = {
    "textvqa": ("llava.eval.benchmarks.textvqa", "TextVQA"),
    "vqav2": ("llava.eval.benchmarks.vqav2", "VQAv2"),
    "vqav2_val": ("llava.eval.benchmarks.vqav2", "VQAv2Val"),
    "vizwiz": ("llava.eval.benchmarks.vizwiz", "VizWiz"),
    "vizwiz_val": ("llava.eval.benchmarks.vizwiz", "VizWizVal"),
    "gqa": ("llava.eval.benchmarks.gqa", "GQA"),
    "scienceqa": ("llava.eval.benchmarks.scienceqa", "ScienceQA"),
    "scienceqa_full": ("llava.eval.benchmarks.scienceqa", "ScienceQAFull"),
    "mme": ("llava.eval.benchmarks.mme", "MME"),
    "mmbench": ("llava.eval.benchmarks.mmbench", "MMBench"),
    "mmbench_cn": ("llava.eval.benchmarks.mmbench", "MMBenchCN"),
    "mmvet": ("llava.eval.benchmarks.mmvet", "MMVet"),
    "tgif": ("llava.eval.benchmarks.video", "TGIF"),
    "msvd": ("llava.eval.benchmarks.video", "MSVD"),
    "msrvtt": ("llava.eval.benchmarks.video", "MSRVTT"),
    "activitynet": ("llava.eval.benchmarks.video", "ActivityNet"),
    "pope": ("llava.eval.benchmarks.pope", "Pope"),
}

# other names in use, such as LLaVA's script and folder names
_ALIASES = {
    "sqa": "scienceqa",
    "scienceqa_img": "scienceqa",
    "vqa": "vqav2",
    "mm_vet": "mmvet",
    "mmbench_en": "mmbench",
}


def benchmark_name(text: str) -> str:
    """Return the registered name of an alias; unknown names are returned for argparse to reject."""
    name = text.lower().replace("-", "_").removesuffix("_qa")
    return name if name in _MODULES else _ALIASES.get(name, text)


def list_benchmarks() -> list[str]:
    """Return the names of all benchmarks, sorted."""
    return sorted(_MODULES)


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a registered name. Raises ValueError that lists the names."""
    if name not in _MODULES:
        raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(list_benchmarks())}")
    module, class_name = _MODULES[name]
    return getattr(import_module(module), class_name)()

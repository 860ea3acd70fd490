"""Writers of the bundled benchmarks, in the official file layouts and formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import choices, short_answers
from .common import BenchmarkImage
from .pope import pope

# Every writer takes the root of all benchmarks and the images, and returns the number of questions.
WRITERS: dict[str, Callable[[Path, list[BenchmarkImage]], int]] = {
    "pope": pope,
    "vqav2": short_answers.vqav2,
    "gqa": short_answers.gqa,
    "vizwiz": short_answers.vizwiz,
    "scienceqa": choices.scienceqa,
    "textvqa": short_answers.textvqa,
    "mme": choices.mme,
    "mmbench": choices.mmbench,
    "mmbench_cn": choices.mmbench_cn,
    "mmvet": short_answers.mmvet,
}

"""The ablations: which choice of VisPruner each one changes, and to what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava.analysis.ablation.variant import VisPrunerVariant
from llava.pruning import Pruner, get_pruner

JOB_OPTIONS = ("tower_dtype", "attn_implementation")  # options of `jobs.job.Job`, not of the pruner
_SMALL = ("pope", "gqa", "vqav2_val")


@dataclass(frozen=True)
class Ablation:
    """One ablation.

    Attributes:
        title: Heading of its tables.
        axis: What changes: title of the first column, label of the plot's x axis.
        values: Label -> options: fields of `VisPrunerVariant`, "method" for another method, or
            `JOB_OPTIONS`.
        default: Label of the value that all others are compared with.
        about: What the reader has to know, below the tables.
        numeric: The labels are numbers, so that the plot has a linear axis.
        crops: The bundled model that cuts images into crops is the default.
        agreement: Kept tokens and answers are compared with those of the default, too.
        where: The accuracy on questions about positions is shown, too.
        benchmarks: The default of --benchmarks.
        limit: The default of --limit with the bundled data, where a CPU needs too long for all questions.
    """

    title: str
    axis: str
    values: Mapping[str, Mapping[str, Any]]
    default: str
    about: str = ""
    numeric: bool = False
    crops: bool = False
    agreement: bool = False
    where: bool = False
    benchmarks: tuple[str, ...] = _SMALL
    limit: int | None = 1200

    def job_options(self) -> dict[tuple[tuple[str, str], ...], list[str]]:
        """Return the labels by the `JOB_OPTIONS` that they need, those of the default first."""
        found: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for label in (self.default, *(label for label in self.values if label != self.default)):
            chosen = self.values[label]
            key = tuple((name, chosen[name]) for name in JOB_OPTIONS if name in chosen)
            found.setdefault(key, []).append(label)
        return found

    def pruner(self, label: str, tokens: int, seed: int = 0) -> Pruner:
        """Return the method of a value at one budget."""
        options = {key: value for key, value in self.values[label].items() if key not in JOB_OPTIONS}
        if "method" in options:
            return get_pruner(options["method"], tokens, seed=seed)
        return VisPrunerVariant(tokens, seed=seed, **options)


def _towers() -> dict[str, dict[str, str]]:
    pairs = [
        ("float32", "sdpa"),
        ("float32", "eager"),
        ("bfloat16", "sdpa"),
        ("bfloat16", "eager"),
        ("float16", "sdpa"),
        ("float16", "eager"),
    ]
    return {
        f"{dtype}, {kernel}": {"tower_dtype": dtype, "attn_implementation": kernel} for dtype, kernel in pairs
    }


ABLATIONS = {
    "ratio": Ablation(
        "Share of important tokens",
        "r",
        {f"{tenth / 10:g}": {"important_ratio": tenth / 10} for tenth in range(11)},
        "0.5",
        "r = 0 keeps diverse tokens only, r = 1 important ones only.",
        numeric=True,
        benchmarks=("pope",),
    ),
    "components": Ablation(
        "Components",
        "kept tokens",
        {
            "random": {"method": "random"},
            "important": {"important_ratio": 1.0},
            "diverse": {"important_ratio": 0.0},
            "both": {},
        },
        "both",
        "Important: r = 1. Diverse: r = 0. Both: r = 0.5.",
    ),
    "cue_layer": Ablation(
        "Layer of the cue",
        "layer",
        {
            **{f"{twelfth}/12": {"cue": f"attention@{twelfth}/12"} for twelfth in (2, 4, 6, 8, 10)},
            "select": {},
        },
        "select",
        "[CLS] attention of another layer decides which tokens are important, and the order of the others; "
        "the features are those of the select layer in any case. n/12: that share of the tower's layers.",
    ),
    "cue": Ablation(
        "Cue of importance",
        "cue",
        {
            "[CLS] attention": {},
            "received attention": {"cue": "received"},
            "feature norm": {"cue": "norm"},
            "random": {"cue": "random"},
        },
        "[CLS] attention",
        "The cue decides which tokens are important, and the order of the others.",
    ),
    "similarity": Ablation(
        "Features that are compared",
        "features",
        {
            "tower": {},
            "projected": {"similarity": "projected"},
            "keys": {"similarity": "keys"},
        },
        "tower",
        "Keys: projections of the select layer, mean over the heads.",
    ),
    "drop": Ablation(
        "Tokens dropped per round",
        "drop per round",
        {
            **{str(count): {"drop": count} if count != 8 else {} for count in (1, 2, 4, 8, 16)},
            "all": {"drop": "all"},
        },
        "8",
        "All: as many as a round can drop. Until the last round, that is every second token of the list, "
        "whatever it is similar to.",
    ),
    "order": Ablation(
        "Order of the residual list",
        "order",
        {"by attention": {}, "raster": {"order": "raster"}, "random": {"order": "random"}},
        "by attention",
        "The order decides which tokens are compared with each other (the even/odd split of every round).",
    ),
    "positions": Ablation(
        "Position ids of kept tokens",
        "positions",
        {"contiguous": {}, "original": {"positions": "original"}, "all tokens": {"method": "none"}},
        "contiguous",
        "Original: the position ids that the tokens have in the unpruned prompt. Where: share of right "
        "answers to questions with the words left, right, above, below or where.",
        where=True,
        benchmarks=("pope", "gqa", "mme"),
    ),
    "crops": Ablation(
        "Budget of an image in crops",
        "budget",
        {"per crop": {}, "per image": {"budget": "image"}},
        "per crop",
        "Tokens are per crop; per image, the same total is chosen among the tokens of all crops.",
        crops=True,
        benchmarks=("pope",),
        limit=120,
    ),
    "dtype": Ablation(
        "Tower dtype and kernel",
        "tower",
        _towers(),
        "float32, sdpa",
        "The language model stays in its own dtype; the kernel is that of tower and language model. Kept "
        "IoU: intersection over union of the kept tokens of an image with those of the default, mean over "
        "the images. Changed: share of the answers that differ from those of the default.",
        agreement=True,
        benchmarks=("pope",),
        limit=300,
    ),
}

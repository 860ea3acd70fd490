"""The paper's numbers (`published.json`, with their source), and how it sums a row up: Acc. and Rel.

    from llava.eval.tables.published import load_published, accuracy, relative
    table = load_published()["llava-1.5-7b"]

Scores are in percent, MME in perception points (at most 2,000). Token counts are totals that enter the
language model. The numbers were read off the printed tables and are rounded as printed there. FLOPs are not
printed for most rows: `prefill_flops` computes them from the shapes of the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import DataError

PUBLISHED = Path(__file__).with_name("published.json")
TEXT_TOKENS = 80  # of a prompt; with them the paper's efficiency table follows from the shapes
RATIO = 0.5  # share of important tokens behind all published rows of VisPruner
_MME_SCALE = 100 / 2000
_FASTV_LAYERS = 2  # that see all tokens


@dataclass(frozen=True)
class Column:
    """One column: what it is called, and where its number stands in a score.json of `benchmark`."""

    title: str
    benchmark: str | None = None  # None: derived from other columns, or not a benchmark's
    detail: str | None = None  # a key of `details` instead of the score
    digits: int = 1


COLUMNS = {
    "vqav2": Column("VQAv2", "vqav2"),
    "gqa": Column("GQA", "gqa"),
    "vizwiz": Column("VizWiz", "vizwiz"),
    "sqa_img": Column("SQA-IMG", "scienceqa"),
    "textvqa": Column("TextVQA", "textvqa"),
    "pope": Column("POPE", "pope"),
    "mme": Column("MME", "mme"),
    "mmbench": Column("MMB", "mmbench"),
    "mmbench_cn": Column("MMB-CN", "mmbench_cn"),
    "mmvet": Column("MM-Vet", "mmvet"),
    "acc": Column("Acc."),
    "rel": Column("Rel."),
    **{
        f"{name}_acc": Column(f"{title} Acc.", name)
        for name, title in (("tgif", "TGIF"), ("msvd", "MSVD"), ("msrvtt", "MSRVTT"))
    },
    **{
        f"{name}_score": Column(f"{title} score", name, "average_score", 2)
        for name, title in (("tgif", "TGIF"), ("msvd", "MSVD"), ("msrvtt", "MSRVTT"))
    },
    "avg_acc": Column("Avg. Acc."),
    "avg_score": Column("Avg. score", digits=2),
    "flops_T": Column("FLOPs (T)"),
    "kv_cache_MB": Column("KV cache (MB)", digits=0),
    "gpu_memory_GB": Column("GPU memory (GB)"),
    "cuda_time_ms": Column("CUDA time (ms)", digits=0),
}
DERIVED = ("acc", "rel", "avg_acc", "avg_score")


@dataclass(frozen=True)
class Model:
    """A model of a table. language: layers, width, MLP width. checkpoints: names its weights go by."""

    name: str
    title: str
    full_tokens: int
    checkpoints: tuple[str, ...]
    language: tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    """One printed line; `tokens` in total; values by column."""

    model: str
    method: str
    tokens: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """One table of the paper. tokens_per_budget: total tokens for every token of a budget (5 crops: 5)."""

    name: str
    title: str
    source: str
    tokens_per_budget: int
    models: Mapping[str, Model]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def scored(self) -> list[str]:
        """Columns that are a benchmark's number."""
        return [name for name in self.columns if COLUMNS[name].benchmark]

    @property
    def summary(self) -> str | None:
        """The column that sums a row up, for the plots: Acc. or the mean over the video sets."""
        return next((name for name in ("acc", "avg_acc") if name in self.columns), None)


def load_published(path: Path = PUBLISHED) -> dict[str, Table]:
    """All published tables by name. Raises DataError naming file, table and row of what is wrong."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; it comes with the package, which must be installed again"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not a JSON document ({error})") from error
    if not isinstance(document, dict) or not {"source", "tables"} <= document.keys():
        raise DataError(f"{path}: lacks 'source' or 'tables'; another file?")
    return {
        name: _table(f"{path}: table {name}", name, document["source"], raw)
        for name, raw in document["tables"].items()
    }


def _table(place: str, name: str, source: str, raw: Mapping[str, Any]) -> Table:
    try:
        columns = tuple(raw["columns"])
        strange = [column for column in columns if column not in COLUMNS]
        if strange:
            raise DataError(f"{place}: unknown column {strange[0]!r}; there are {', '.join(COLUMNS)}")
        models = {
            key: Model(
                key, one["title"], one["full_tokens"], tuple(one["checkpoints"]), tuple(one["language"])
            )
            for key, one in raw["models"].items()
        }
        rows = [
            _row(f"{place}, row {number}", one, columns, models) for number, one in enumerate(raw["rows"], 1)
        ]
        keys = [(row.model, row.method, row.tokens) for row in rows]
        twice = [key for place_, key in enumerate(keys) if key in keys[:place_]]
        if twice:
            raise DataError(f"{place}: two rows of {', '.join(map(str, twice[0]))} tokens")
        return Table(name, raw["title"], source, raw["tokens_per_budget"], models, columns, tuple(rows))
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: lacks or misuses {error}") from error


def _row(place: str, raw: Mapping[str, Any], columns: Sequence[str], models: Mapping[str, Model]) -> Row:
    values = raw["values"]
    if len(values) != len(columns):
        raise DataError(f"{place}: {len(values)} values for {len(columns)} columns")
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong:
        raise DataError(f"{place}: {wrong[0]!r} is not a number")
    if raw["model"] not in models:
        raise DataError(f"{place}: model {raw['model']!r} is not among {', '.join(models)}")
    return Row(raw["model"], raw["method"], raw["tokens"], dict(zip(columns, values, strict=True)))


def accuracy(scores: Mapping[str, float]) -> float:
    """Acc.: mean of the scores, MME as MME / 2000 x 100. Raises ValueError of no scores."""
    if not scores:
        raise ValueError("no scores to take the mean of")
    return sum(value * _MME_SCALE if name == "mme" else value for name, value in scores.items()) / len(scores)


def relative(scores: Mapping[str, float], full: Mapping[str, float]) -> float:
    """Rel.: 100 x mean of score / score with all tokens (a mean of ratios, in which MME's scale cancels).

    Raises ValueError if the two are about different benchmarks, or a score with all tokens is 0.
    """
    if not scores or set(scores) != set(full):
        raise ValueError("Rel. wants the same benchmarks on both sides, at least one")
    if not all(full.values()):
        raise ValueError("Rel. is not defined where the score with all tokens is 0")
    return 100 * sum(value / full[name] for name, value in scores.items()) / len(scores)


def summarise(
    columns: Sequence[str], values: Mapping[str, float | None], full: Mapping[str, float | None] | None
) -> dict[str, float | None]:
    """The derived columns among `columns`; None where a number they need is missing.

    values, full: scores by column, of the row and of the same model with all tokens (None: not there).
    """
    scored = [name for name in columns if COLUMNS[name].benchmark]
    found: dict[str, float | None] = {}
    for name in columns:
        if name not in DERIVED:
            continue
        parts = scored
        if name in ("avg_acc", "avg_score"):
            parts = [part for part in scored if part.endswith(name.removeprefix("avg"))]
        own = {part: values.get(part) for part in parts}
        whole = {part: (full or {}).get(part) for part in parts}
        found[name] = None
        if None in own.values() or not own:
            continue
        if name != "rel":
            found[name] = accuracy(own)  # type: ignore[arg-type]
        elif None not in whole.values() and all(whole.values()):
            found[name] = relative(own, whole)  # type: ignore[arg-type]
    return found


def restrict(table: Table, columns: Sequence[str]) -> Table:
    """The table with some of its benchmarks only; its summary columns by the same rule over these.

    Raises ValueError for a benchmark that it does not have.
    """
    strange = [name for name in columns if name not in table.scored]
    if strange:
        raise ValueError(
            f"table {table.name} has no column {strange[0]!r}; there are "
            f"{', '.join(table.scored) or 'none to choose from'}"
        )
    summary = [name for name in table.columns if not COLUMNS[name].benchmark]
    kept = tuple(name for name in table.columns if name in columns or name in summary)
    full = {row.model: row.values for row in table.rows if row.method == "none"}
    rows = []
    for row in table.rows:
        derived = summarise(kept, row.values, full.get(row.model))
        values = {name: row.values[name] for name in kept if name in columns}
        rows.append(replace(row, values=values | {k: v for k, v in derived.items() if v is not None}))
    source = f"{table.source} (means reckoned anew from its rows, over these columns)"
    return replace(table, source=source, columns=kept, rows=tuple(rows))


def prefill_flops(method: str, tokens: float, model: Model, text_tokens: float = TEXT_TOKENS) -> float | None:
    """FLOPs (2 per multiply-accumulate) of the language model's prefill; None where tokens do not say it.

    FastV's first two layers see all tokens. SparseVLM's budget is a mean over layers that its rows do not
    give away.
    """
    from llava.model.flops import LanguageShape, llm_prefill_macs

    if method == "sparsevlm":
        return None
    layers = model.language[0]
    pruned, early = round(tokens + text_tokens), _FASTV_LAYERS if method == "fastv" else 0
    per_layer = [round(model.full_tokens + text_tokens)] * early + [pruned] * (layers - early)
    return float(2 * llm_prefill_macs(per_layer, LanguageShape(*model.language)))

"""The report of `gpu_check.py`: goals, tables for the documents, and all measurements. Runs no model.

    markdown(document)      # report.md; its sections can be pasted into docs/performance.md
    goals(document)         # every goal with its measured value, or the reason why there is none

Goals are quotients of times of one run on one card. Their baseline is LLaVA's own way: an eager tower that
returns all attention matrices, all patches projected, one question at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.table import Table, TableCell, TableRow

Document = dict[str, Any]
PUBLISHED_SHARES = "best published: 82 % on a server CPU, 68 % on a GPU"


class Unmeasured(Exception):
    """A value is not in the document; the message is the reason."""


@dataclass(frozen=True)
class Goal:
    """A number to reach: `value` reads it from the document, and raises Unmeasured."""

    name: str
    value: Callable[[Document], float]
    limit: float
    at_most: bool = True
    unit: str = ""

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def target(self) -> str:
        return f"{'<=' if self.at_most else '>='} {_number(self.limit, self.unit)}"


# --- reading values --------------------------------------------------------------------------------------


def measured(document: Document, part: str, name: str) -> Any:
    """Return a measurement.

    Raises:
        Unmeasured: there is none; the message says why.
    """
    record = document["parts"].get(part)
    if record is None:
        raise Unmeasured(f"part {part} was not run")
    if name in record["measurements"]:
        return record["measurements"][name]
    reasons = record["errors"] | record["not_measured"]
    reason = reasons.get(name) or reasons.get("preparation") or record["reason"]
    raise Unmeasured(f"{part}: {reason or f'there is no measurement {name!r}'}")


def median(document: Document, part: str, name: str, variant: str) -> float:
    """Return a median in milliseconds."""
    found = measured(document, part, name)
    if variant not in found:
        raise Unmeasured(f"{part}, {name}: {found.get(f'{variant}_error', f'{variant} was not measured')}")
    return found[variant]["median_ms"]


def names(document: Document, part: str, prefix: str = "") -> list[str]:
    """Return the names of a part's measurements that start with `prefix`."""
    found = document["parts"].get(part, {}).get("measurements", {})
    return [name for name in found if name.startswith(prefix)]


def by_tokens(document: Document, part: str, prefix: str = "") -> dict[int | None, str]:
    """Return the names of measurements by their budget, all tokens first."""
    found = document["parts"].get(part, {}).get("measurements", {})
    return {found[name]["tokens"]: name for name in names(document, part, prefix) if "tokens" in found[name]}


def _over(part: str, above: tuple[str, str], below: tuple[str, str]) -> Callable[[Document], float]:
    """Divide two medians of a part, each given by (measurement, variant)."""

    def value(document: Document) -> float:
        above_name, below_name = (_resolve(document, one[0]) for one in (above, below))
        return median(document, part, above_name, above[1]) / median(document, part, below_name, below[1])

    return value


def _resolve(document: Document, name: str) -> str:
    """Replace the placeholders of names: budgets and dtype depend on the model that was measured."""
    environment = document["environment"]
    half = "float16" if str(environment["device"]).startswith("cuda") else "float32"
    budgets = document["budgets"]
    return name.format(middle=budgets["1.5"][1], next=budgets["next"][-1], half=half)


def _compiled(name: str, part: str, below: tuple[str, str]) -> Callable[[Document], float]:
    """Divide a median of the part `compile` by one of another part."""

    def value(document: Document) -> float:
        return median(document, "compile", name, "compiled") / median(
            document, part, _resolve(document, below[0]), below[1]
        )

    return value


def _decoded(document: Document) -> float:
    found = measured(document, "decode", _resolve(document, "token, {middle}"))
    return found["graph_ms"] / found["eager_ms"]


def _decoded_compiled(document: Document) -> float:
    eager = measured(document, "decode", _resolve(document, "token, {middle}"))
    return measured(document, "compile", "decoded token")["compiled_ms"] / eager["eager_ms"]


def _compiled_own(document: Document) -> float:
    return median(document, "compile", "first token, 64", "compiled") / median(
        document, "compile", "first token, none", "compiled"
    )


def _compiled_tower(document: Document) -> float:
    return median(document, "compile", "tower, 1 crop", "compiled") / median(
        document, "compile", "tower, 1 crop", "bare"
    )


def _selection_speedup(document: Document) -> float:
    name = _resolve(document, "5 rows, T = {middle}")
    return median(document, "selection", name, "loop") / median(document, "selection", name, "graph")


def _selection_time(document: Document) -> float:
    return median(document, "selection", _resolve(document, "5 rows, T = {middle}"), "graph")


def _rate(part: str, name: str) -> Callable[[Document], float]:
    return lambda document: measured(document, part, name)["questions_per_second"]


def _speedup(part: str, name: str) -> Callable[[Document], float]:
    def value(document: Document) -> float:
        baseline = measured(document, "engine", "baseline")["questions_per_second"]
        return measured(document, part, name)["questions_per_second"] / baseline

    return value


def _tests(document: Document) -> float:
    return measured(document, "tests", "tests")["passed"]


def slowest_pruned(batch: int) -> Callable[[Document], float]:
    """Return a reader of the largest time of a budget over the unpruned one, at a batch size."""

    def value(document: Document) -> float:
        if batch == 1:
            found = {
                name: median(document, "first-token-1.5", name, "graph")
                for name in by_tokens(document, "first-token-1.5").values()
            }
        else:
            name = f"batch {batch}"
            record = measured(document, "first-token-1.5", name)
            found = {key: one["median_ms"] for key, one in record.items() if isinstance(one, dict)}
        pruned = [time for name, time in found.items() if name != "none"]
        if "none" not in found or not pruned:
            measured(document, "first-token-1.5", "none")
            raise Unmeasured("first-token-1.5: no pruned budget was measured")
        return max(pruned) / found["none"]

    return value


FIRST, NEXT = "first-token-1.5", "first-token-next"
GOALS = (
    Goal("tests marked gpu that passed (none failed)", _tests, 1, at_most=False),
    Goal(
        "first token, LLaVA-1.5, 64 of 576 tokens, over the unpruned baseline",
        _over(FIRST, ("{middle}", "graph"), ("none", "baseline")),
        0.36,
    ),
    Goal("the same with --compile", _compiled("first token, 64", FIRST, ("none", "baseline")), 0.25),
    Goal(
        "first token, LLaVA-1.5, 64 tokens, over our own unpruned",
        _over(FIRST, ("{middle}", "graph"), ("none", "graph")),
        0.50,
    ),
    Goal("the same with --compile", _compiled_own, 0.45),
    Goal(
        "first token, LLaVA-NeXT, 160 of 2,880 tokens, over the unpruned baseline",
        _over(NEXT, ("{next}", "graph"), ("none", "baseline")),
        0.17,
    ),
    Goal("the same with --compile", _compiled("first token, next", NEXT, ("none", "baseline")), 0.12),
    Goal("decoded token, batch 1, over eager", _decoded, 0.40),
    Goal("the same with --compile", _decoded_compiled, 0.25),
    Goal(
        "tower, row and selection, 1 crop, float16, over the bare tower",
        _over("tower", ("1 crops, {half}", "graph"), ("1 crops, {half}", "bare")),
        0.45,
    ),
    Goal("the same with --compile", _compiled_tower, 0.35),
    Goal(
        "tower, row and selection, 32 crops, float16, over the bare tower",
        _over("tower", ("32 crops, {half}", "graph"), ("32 crops, {half}", "bare")),
        1.10,
    ),
    Goal(
        "tower, row and selection, 1 crop, float32, over the bare tower",
        _over("tower", ("1 crops, float32", "graph"), ("1 crops, float32", "bare")),
        1.05,
    ),
    Goal("selection, 5 rows, loop over captured", _selection_speedup, 40, at_most=False, unit="x"),
    Goal("selection, 5 rows, captured", _selection_time, 0.8, unit="ms"),
    Goal(
        "engine, GQA-like, default settings, over the baseline", _speedup("engine", "default"), 90, False, "x"
    ),
    Goal("engine, questions per second", _rate("engine", "default"), 650, False),
    Goal("engine with --compile, over the baseline", _speedup("compile", "engine"), 130, False, "x"),
    Goal("engine with --compile, questions per second", _rate("compile", "engine"), 1000, False),
    Goal(
        "card busy while the engine runs",
        lambda d: 100 * measured(d, "engine", "busy")["busy"],
        90,
        False,
        "%",
    ),
    *(
        Goal(f"first token, slowest budget over unpruned, batch {batch}", slowest_pruned(batch), 1.0)
        for batch in (1, 8, 32)
    ),
)


def goals(document: Document) -> list[dict[str, Any]]:
    """Return every goal: name, target, value or None, whether it is met or None, and the reason if it is not
    measured."""
    found = []
    for goal in GOALS:
        value = reason = None
        try:
            value = goal.value(document)
        except Unmeasured as error:
            reason = str(error)
        met = None if value is None else goal.is_met(value)
        found.append(
            {
                "goal": goal.name,
                "target": goal.target(),
                "unit": goal.unit,
                "value": value,
                "met": met,
                "reason": reason,
            }
        )
    return found


# --- the report ------------------------------------------------------------------------------------------


def summary(document: Document) -> str:
    """Return the goals and the state of every part for a terminal."""
    parts = [
        [name, part["state"], f"{part['seconds']:.0f} s", part["reason"] or ""]
        for name, part in document["parts"].items()
    ]
    return (
        f"{_goal_table(document).text()}\n\n"
        f"{_table('Parts', ['part', 'state', 'time', 'reason'], parts, left=4).text()}"
    )


def markdown(document: Document) -> str:
    """Return the whole report."""
    sections = [
        "# GPU report\n",
        _facts(document),
        _goal_table(document).markdown(2),
        gains(document).markdown(2),
        *(table.markdown(2) for table in tables(document)),
        "## All measurements\n",
        *(_part(name, part) for name, part in document["parts"].items()),
    ]
    return "\n".join(sections)


def _facts(document: Document) -> str:
    here, kernels = document["environment"], document.get("kernels", {})
    lines = [
        f"* Device: {here.get('name')}, driver {here.get('driver')}, torch {here.get('torch')} (CUDA "
        f"{here.get('cuda')}), Triton {here.get('triton')}, transformers {here.get('transformers')}, Python "
        f"{here.get('python')}.",
        f"* Models: sizes of {here.get('dummy_model')} and its forms for LLaVA-NeXT and Video-LLaVA, random weights.",
        f"* Attention kernels: {kernels.get('language_model')}, tower {kernels.get('tower')}; baseline: "
        f"{kernels.get('baseline_language_model')}, tower {kernels.get('baseline_tower')}. Selection: "
        f"{kernels.get('selection')}.",
        "* Times include pruning itself: tower, [CLS] row, selection, projector and prefill, from pixels on the "
        "host to the token. Decoding of image files is included in questions per second only.",
        f"* Code {document.get('code')}, {document.get('total_seconds', '?')} seconds in all.",
    ]
    codes = {part.get("code") for part in document["parts"].values()} - {None, document.get("code")}
    if codes:
        lines.append(f"* Some parts were measured with other code ({', '.join(sorted(codes))}).")
    return "\n".join(lines) + "\n"


def _goal_table(document: Document) -> Table:
    rows = [
        [
            one["goal"],
            one["target"],
            "not measured" if one["value"] is None else _number(one["value"], one["unit"]),
            {True: "met", False: "not met", None: one["reason"]}[one["met"]],
        ]
        for one in document["goals"]
    ]
    return _table("Goals", ["what", "goal", "measured", "result"], rows)


def gains(document: Document) -> Table:
    """Return the table "What pruning buys": one line per quantity, all tokens and three budgets side by side."""
    lines: list[list[str]] = []
    for title, part, prefix, variant in (
        ("first token, one image, ms", FIRST, "", "graph"),
        ("first token, LLaVA-NeXT, ms", NEXT, "", "graph"),
        ("first token, 8 frames of a video, ms", "video", "", "graph"),
    ):
        lines.append(_line(document, title, part, prefix, lambda one, v=variant: one[v]["median_ms"], True))
    lengths = sorted({one["new_tokens"] for one in _records(document, "decode") if "new_tokens" in one})
    for count in lengths:
        prefix = f"{count} tokens"
        line = _line(
            document, f"answer of {count} tokens, ms", "decode", prefix, lambda one: one["graph"]["median_ms"]
        )
        lines.append(line)
    lines += [
        _line(
            document,
            "questions/s, image prefix shared",
            "engine",
            "default",
            lambda one: one["questions_per_second"],
        ),
        _line(
            document,
            "questions/s, nothing shared",
            "engine",
            "not shared",
            lambda one: one["questions_per_second"],
        ),
    ]
    for size in ("24 GB", "80 GB"):
        title = f"images that fit into {size}"
        lines.append(_line(document, title, "memory", "", lambda one, s=size: one["images"][s]))
    for prefix, title in (
        ("tiny", "first token on the CPU, small model, ms"),
        ("bfloat16", "first token on the CPU, bfloat16, ms"),
    ):
        lines.append(_line(document, title, "cpu", prefix, lambda one: one["eager"]["median_ms"], True))
    notes = [
        "Budgets are the three of the model: 128, 64 and 32 tokens of a crop (57, 28 and 14 of a frame). The "
        "reduction realized is the reduction of the time at the second budget over that of all FLOPs (tower, "
        f"selection, projector, language model); {PUBLISHED_SHARES}, of the prefill alone.",
        "Images that fit: KV caches of the prompts beside the weights and the peak of one first token, computed.",
    ]
    header = ["", "all tokens", "first budget", "second", "third", "time saved", "FLOPs saved", "realized"]
    return _table("What pruning buys", header, lines, notes, left=1)


def _records(document: Document, part: str) -> list[dict[str, Any]]:
    return list(document["parts"].get(part, {}).get("measurements", {}).values())


def _line(
    document: Document,
    title: str,
    part: str,
    prefix: str,
    value: Callable[[Any], float],
    reduction: bool = False,
) -> list[str]:
    """Return a line of `gains`, with dashes for what is not measured."""
    found = by_tokens(document, part, prefix)
    records = document["parts"].get(part, {}).get("measurements", {})
    budgets = [None, *sorted((one for one in found if one is not None), reverse=True)]
    values = {one: value(records[found[one]]) for one in budgets if one in found}
    cells = [_number(values[one]) if one in values else "-" for one in (*budgets, *[-1] * 3)][:4]
    second = budgets[2] if len(budgets) > 2 else None
    if not reduction or second is None or None not in values:
        return [title, *cells, "", "", ""]
    saved = 1 - values[second] / values[None]
    costs = [records[found[one]]["flops"]["total"] for one in (None, second)]
    theory = 1 - costs[1] / costs[0]
    return [title, *cells, f"{100 * saved:.0f} %", f"{100 * theory:.0f} %", f"{100 * saved / theory:.0f} %"]


def tables(document: Document) -> list[Table]:
    """Return the tables of single measurements that the documents show."""
    found = []
    for title, part in (("LLaVA-1.5", FIRST), ("LLaVA-NeXT", NEXT), ("Video-LLaVA", "video")):
        rows = []
        for budget, name in by_tokens(document, part).items():
            one = document["parts"][part]["measurements"][name]
            times = [one[variant]["median_ms"] for variant in ("baseline", "eager", "graph")]
            rows.append(
                [
                    _budget_name(budget),
                    one["visual_tokens"],
                    *map(_number, times),
                    *_shares(document, part, one),
                ]
            )
        header = [
            "budget",
            "visual tokens",
            "baseline",
            "eager",
            "captured",
            "captured / unpruned baseline",
            "captured / unpruned",
        ]
        found.append(_table(f"First token, {title}, ms", header, rows))
    batches = []
    for name in names(document, FIRST, "batch"):
        one = document["parts"][FIRST]["measurements"][name]
        batches.append(
            [
                one["batch"],
                *(f"{key}: {_number(t['median_ms'])}" for key, t in one.items() if isinstance(t, dict)),
            ]
        )
    found.append(_table("First token of a batch, ms", ["batch", "", "", "", ""], batches))
    decoded = [
        [
            _budget_name(one["tokens"]),
            _number(one["eager_ms"]),
            _number(one["graph_ms"]),
            _number(one["graph_ms"] / one["eager_ms"]),
        ]
        for one in _records(document, "decode")
        if "eager_ms" in one
    ]
    found.append(
        _table("Decoded token, batch 1, ms", ["budget", "eager", "captured", "captured / eager"], decoded)
    )
    towers = []
    for name in names(document, "tower"):
        one = document["parts"]["tower"]["measurements"][name]
        times = [one[variant]["median_ms"] for variant in ("bare", "tower", "tower_graph", "eager", "graph")]
        towers.append([name, *map(_number, times), _number(times[-1] / times[0])])
    header = [
        "crops, dtype",
        "bare",
        "with row",
        "captured",
        "with row and selection",
        "captured",
        "captured / bare",
    ]
    found.append(_table("Tower, ms", header, towers))
    selections = [
        [one["rows"], one["tokens"], *(_time(one, variant) for variant in ("loop", "eager", "graph"))]
        for one in _records(document, "selection")
    ]
    found.append(_table("Selection, ms", ["rows", "T", "loop", "eager", "captured"], selections))
    prefills = [
        [
            one["length"],
            _time(one, "eager"),
            _time(one, "graph"),
            _number(one["flops"] / one["graph"]["median_ms"] / 1e9),
        ]
        for one in _records(document, "prefill")
    ]
    found.append(_table("Prefill, ms", ["tokens", "eager", "captured", "TFLOP/s"], prefills))
    engines = [
        [
            name,
            one["questions"],
            one.get("batch_size", 1),
            _budget_name(one.get("tokens")),
            _number(one["questions_per_second"]),
        ]
        for name, one in document["parts"].get("engine", {}).get("measurements", {}).items()
        if "questions_per_second" in one
    ]
    found.append(_table("Engine, GQA-like", ["run", "questions", "batch", "budget", "questions/s"], engines))
    prefixes = []
    for one in _records(document, "prefix"):
        whole = one["copy_ms"] + one["copied_ms"] if one["queries"] > 1 else one["copied_ms"]
        prefixes.append(
            [one["prefix"], one["queries"], *(_number(one["layers"] * value) for value in (one["copy_ms"], one["copied_ms"], one["merged_ms"])),
             _number(one["layers"] * (whole - one["merged_ms"])), f"{one['max_difference']:.1e}"]
        )  # fmt: skip
    found.append(
        _table(
            "Attention over a shared prefix, all layers, ms",
            ["prefix", "queries", "copy", "attention, copied", "merged", "saved", "difference"],
            prefixes,
            ["The copy is made once per batch, for the first of its passes."],
        )
    )
    pope = []
    for name, one in document["parts"].get("pope", {}).get("measurements", {}).items():
        for budget in ("none", "64"):
            got = one[budget]
            pope.append(
                [name, budget, one["questions"], f"{got['score']:.4f}",
                 f"{got['answers_that_differ']} of {got['answers_compared']}",
                 f"{got['kept_tokens_that_differ']} of {got['kept_tokens']}", _number(got["questions_per_second"])]
            )  # fmt: skip
    header = [
        "device, dtype",
        "budget",
        "questions",
        "score",
        "answers that differ",
        "kept tokens that differ",
        "questions/s",
    ]
    found.append(_table("Bundled POPE, compared with float32 on the CPU", header, pope))
    return found


def _shares(document: Document, part: str, one: dict[str, Any]) -> list[str]:
    unpruned = document["parts"][part]["measurements"].get("none")
    if unpruned is None:
        return ["-", "-"]
    time = one["graph"]["median_ms"]
    return [_number(time / unpruned[variant]["median_ms"]) for variant in ("baseline", "graph")]


def _part(name: str, part: dict[str, Any]) -> str:
    lines = [
        f"### {name}\n",
        f"{part['state']}, {part['seconds']:.0f} s{': ' + part['reason'] if part['reason'] else ''}\n",
    ]
    for key, value in part["measurements"].items():
        lines.append(f"* {key}: `{_flat(value)}`")
    lines += [f"* {key}: not measured: {reason}" for key, reason in part["not_measured"].items()]
    lines += [f"* {key}: FAILED: `{error}`" for key, error in part["errors"].items()]
    return "\n".join(lines) + "\n"


def _flat(value: Any) -> str:
    """Return a measurement on one line: a timing as its median and extremes."""
    if isinstance(value, dict) and {"median_ms", "fastest_ms", "slowest_ms"} <= value.keys():
        middle, least, most = (_number(value[f"{key}_ms"]) for key in ("median", "fastest", "slowest"))
        return f"{middle} ms ({least} to {most})"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " ".join(_flat(one) for one in value)
    return _number(value) if isinstance(value, float) else str(value).replace("`", "'")


def _time(one: dict[str, Any], variant: str) -> str:
    return _number(one[variant]["median_ms"]) if variant in one else "-"


def _budget_name(budget: int | None) -> str:
    return "none" if budget is None else str(budget)


def _number(value: float, unit: str = "") -> str:
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".strip()


def _table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = (), left: int = 1
) -> Table:
    lines = [TableRow([TableCell(str(cell)) for cell in row]) for row in rows]
    width = len(header)
    lines = lines or [TableRow([TableCell("not measured"), *[TableCell()] * (width - 1)])]
    return Table(title, header, lines, notes, ["left"] * left)

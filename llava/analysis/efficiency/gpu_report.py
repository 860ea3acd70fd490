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
GQA_QUESTIONS = 12578
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
            names = by_tokens(document, "first-token-1.5").values()
            found = {key: one["median_ms"] for key, one in record.items() if key in names}
        pruned = [time for name, time in found.items() if name != "none"]
        if "none" not in found or not pruned:
            measured(document, FIRST, "none")
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
        if met is not None and document.get("environment", {}).get("device") == "cpu":
            met, reason = None, "a rehearsal on a CPU"
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
        f"* Models: sizes of {here.get('dummy_model')}, of LLaVA-NeXT's crops and of Video-LLaVA's frames; "
        "random weights.",
        f"* Attention kernels: {kernels.get('language_model')}, tower {kernels.get('tower')}; baseline: "
        f"{kernels.get('baseline_language_model')}, tower {kernels.get('baseline_tower')}. Selection: "
        f"{kernels.get('selection')}.",
        "* The time of pruning itself is counted: tower, [CLS] row, selection, projector and prefill, from "
        "pixels on the host to the token. Decoding of image files is counted in questions per second only.",
        "* Cache on: the prefix of an image is prefilled once for its questions. Cache off: `not shared`.",
        f"* Code {document.get('code')}, {document.get('total_seconds', '?')} seconds in all.",
    ]
    codes = {part.get("code") for part in document["parts"].values()} - {None, document.get("code")}
    if codes:
        lines.append(f"* Some parts were measured with other code ({', '.join(sorted(codes))}).")
    for name, part in document["parts"].items():
        for one in part["measurements"].values():
            if one.get("not_captured"):
                lines.append(f"* Part {name}, stages without a graph: {_flat(one['not_captured'])}.")
                break
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
    """Return the table "What pruning buys": one line per quantity, all tokens and three budgets."""
    graph, eager = _median("graph"), _median("eager")
    rates = lambda one: one["questions_per_second"]  # noqa: E731
    long = [name for name in names(document, "decode") if not name.startswith("token")]
    count = long[0].split(" ")[0] if long else "256"
    lines = [
        _line(document, "first token, one image, ms", FIRST, "", graph, True),
        _line(document, "first token, LLaVA-NeXT, ms", NEXT, "", graph, True),
        _line(document, "first token, 8 frames of a video, ms", "video", "", graph, True),
        _line(document, "prefill alone, LLaVA-1.5, ms", "prefill", "1.5", graph, True),
        _line(document, "prefill alone, LLaVA-NeXT, ms", "prefill", "next", graph, True),
        _line(document, f"answer of {count} tokens, ms", "decode", f"{count} tokens", graph),
        _line(document, "questions/s, image prefix shared", "engine", "default", rates),
        _line(document, "questions/s, nothing shared", "engine", "not shared", rates),
        *(
            _line(
                document, f"images that fit into {size}", "memory", "", lambda one, s=size: one["images"][s]
            )
            for size in ("24 GB", "80 GB")
        ),
        _line(document, "first token on the CPU, small model, ms", "cpu", "tiny", eager, True),
        _line(document, "first token on the CPU, bfloat16, ms", "cpu", "bfloat16", eager, True),
    ]
    notes = [
        "Budgets are the three of the model: 128, 64 and 32 tokens of a crop (57, 28 and 14 of a frame). The "
        "reduction realized is the reduction of the time at the second budget over that of the FLOPs: of the "
        f"language model for a prefill, else of all parts ({PUBLISHED_SHARES}).",
        "Images that fit: KV caches of prompts, besides weights and the peak of one first token; computed.",
    ]
    header = ["", "all tokens", "first budget", "second", "third", "time saved", "FLOPs saved", "realized"]
    return _table("What pruning buys", header, lines, notes)


def _median(variant: str) -> Callable[[dict[str, Any]], float]:
    return lambda one: one[variant]["median_ms"]


def _line(
    document: Document,
    title: str,
    part: str,
    prefix: str,
    value: Callable[[dict[str, Any]], float],
    reduction: bool = False,
) -> list[str]:
    """Return a line of `gains`, with dashes for what is not measured."""
    records = _measurements(document, part)
    found = {records[name]["tokens"]: records[name] for name in by_tokens(document, part, prefix).values()}
    pruned = sorted((budget for budget in found if budget is not None), reverse=True)
    budgets = [None, *pruned]
    values = {budget: _value(value, found[budget]) for budget in budgets if budget in found}
    cells = [_cell(values.get(budget)) for budget in budgets][:4]
    cells += ["-"] * (4 - len(cells))
    second = pruned[1] if len(pruned) > 1 else None
    if not reduction or second is None or values.get(None) is None or values[second] is None:
        return [title, *cells, "", "", ""]
    saved = 1 - values[second] / values[None]
    theory = 1 - found[second]["flops"]["total"] / found[None]["flops"]["total"]
    return [title, *cells, *(f"{100 * one:.0f} %" for one in (saved, theory, saved / theory))]


def tables(document: Document) -> list[Table]:
    """Return the tables of single measurements that the documents show."""
    bare, baseline, eager, graph = map(_median, ("bare", "baseline", "eager", "graph"))
    found = []
    for title, part in (("LLaVA-1.5", FIRST), ("LLaVA-NeXT", NEXT), ("Video-LLaVA", "video")):
        unpruned = _measurements(document, part).get("none", {})
        columns = {
            "budget": lambda one: _budget_name(one["tokens"]),
            "visual tokens": lambda one: one["visual_tokens"],
            "baseline": baseline,
            "eager": eager,
            "captured": graph,
            "captured / unpruned baseline": lambda one, u=unpruned: graph(one) / baseline(u),
            "captured / unpruned": lambda one, u=unpruned: graph(one) / graph(u),
        }
        found.append(_of_part(document, part, f"First token, {title}, ms", columns, "visual_tokens"))
    budgets = ["none", *map(str, document["budgets"]["1.5"])]
    columns = {"batch": lambda one: one["batch"], **{name: _median(name) for name in budgets}}
    found.append(_of_part(document, FIRST, "First token of a batch, ms", columns, "batch"))
    columns = {
        "ms": lambda one: 1000 * one["seconds"],
        "card busy, ms": lambda one: 1000 * one["busy_seconds"],
        "share": lambda one: one["busy"],
        "kernels and copies": lambda one: one["events"],
    }
    for part in (FIRST, NEXT, "video", "engine"):
        title = f"Card busy, {part}"
        if names(document, part, "busy"):
            found.append(_of_part(document, part, title, columns, "busy_seconds"))
    columns = {
        "budget": lambda one: _budget_name(one["tokens"]),
        "eager": lambda one: one["eager_ms"],
        "captured": lambda one: one["graph_ms"],
        "captured / eager": lambda one: one["graph_ms"] / one["eager_ms"],
    }
    found.append(_of_part(document, "decode", "Decoded token, batch 1, ms", columns, "eager_ms"))
    columns = {
        "bare": bare,
        "with row": _median("tower"),
        "with row, captured": _median("tower_graph"),
        "with row and selection": eager,
        "the same, captured": graph,
        "captured / bare": lambda one: graph(one) / bare(one),
    }
    found.append(_of_part(document, "tower", "Tower, ms", columns, "crops", "crops, dtype"))
    columns = {"loop": _median("loop"), "eager": eager, "captured": graph}
    found.append(_of_part(document, "selection", "Selection, ms", columns, "rows", "rows"))
    columns = {
        "tokens": lambda one: one["length"],
        "eager": eager,
        "captured": graph,
        "TFLOP/s": lambda one: one["flops"]["total"] / graph(one) / 1e9,
    }
    found.append(_of_part(document, "prefill", "Prefill, ms", columns, "length", "prompt"))
    columns = {
        "questions": lambda one: one["questions"],
        "batch": lambda one: one.get("batch_size", 1),
        "budget": lambda one: _budget_name(one["tokens"]),
        "questions/s": lambda one: one["questions_per_second"],
        "GQA testdev, s": lambda one: GQA_QUESTIONS / one["questions_per_second"],
    }
    found.append(_of_part(document, "engine", "Engine, GQA-like", columns, "questions_per_second", "run"))
    columns = {
        "copy": lambda one: one["layers"] * one["copy_ms"],
        "attention, copied": lambda one: one["layers"] * one["copied_ms"],
        "attention, merged": lambda one: one["layers"] * one["merged_ms"],
        "difference": lambda one: f"{one['max_difference']:.1e}",
    }
    title, notes = "Attention over a shared prefix, all layers, ms", ["The copy is made once per batch."]
    found.append(_of_part(document, "prefix", title, columns, "copy_ms", "prefix, queries", notes))
    columns = {
        "images compared": lambda one: one["images_compared"],
        "questions": lambda one: one["questions"],
    }
    for budget in ("none", "64"):
        columns |= {
            f"score, {budget}": lambda one, b=budget: f"{one[b]['score']:.4f}",
            f"answers that differ, {budget}": lambda one, b=budget: (
                f"{one[b]['answers_that_differ']} of {one[b]['answers_compared']}"
            ),
            f"kept tokens that differ, {budget}": lambda one, b=budget: (
                f"{one[b]['kept_tokens_that_differ']} of {one[b]['kept_tokens']}"
            ),
        }
    title = "Bundled POPE, compared with float32 on the CPU"
    found.append(_of_part(document, "pope", title, columns, "images", "device, dtype"))
    return found


def _measurements(document: Document, part: str) -> dict[str, dict[str, Any]]:
    return document["parts"].get(part, {}).get("measurements", {})


def _of_part(
    document: Document,
    part: str,
    title: str,
    columns: dict[str, Callable[[dict[str, Any]], Any]],
    key: str,
    named: str = "",
    notes: Sequence[str] = (),
) -> Table:
    """Return a table of the measurements of a part that have `key`, one per line.

    Args:
        named: Title of a first column with the names of the measurements; "" for none.
    """
    rows = [
        [*([name] if named else []), *(_cell(_value(column, one)) for column in columns.values())]
        for name, one in _measurements(document, part).items()
        if key in one
    ]
    return _table(title, [*([named] if named else []), *columns], rows, notes)


def _value(function: Callable[[dict[str, Any]], Any], one: dict[str, Any]) -> Any:
    """Return a value of a measurement; None if it is not there, because a variant of it failed."""
    try:
        return function(one)
    except KeyError:
        return None


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return _number(value) if isinstance(value, float) else str(value)


def _part(name: str, part: dict[str, Any]) -> str:
    reason = f": {part['reason']}" if part["reason"] else ""
    lines = [f"### {name}\n", f"{part['state']}, {part['seconds']:.0f} s{reason}\n"]
    lines += [f"* {key}: `{_flat(value)}`" for key, value in part["measurements"].items()]
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
        return " ".join(map(_flat, value))
    return _number(value) if isinstance(value, float) else str(value).replace("`", "'").replace("\n", " ")


def _budget_name(budget: int | None) -> str:
    return "none" if budget is None else str(budget)


def _number(value: float, unit: str = "") -> str:
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".strip()


def _table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = (), left: int = 1
) -> Table:
    lines = [TableRow([TableCell(str(cell)) for cell in row]) for row in rows]
    lines = lines or [TableRow([TableCell("not measured"), *[TableCell()] * (len(header) - 1)])]
    return Table(title, header, lines, notes, ["left"] * left)

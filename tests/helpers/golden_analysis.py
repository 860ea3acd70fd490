"""Compare the attention analysis with reference data.

    PYTHONPATH=.:tests python -m helpers.golden_analysis DIR

DIR holds analysis.json (definitions and tolerances in its `meta`), analysis_arrays.npz and the question files
of its groups. Checkpoints are found by name in DIR, DIR/../model and tests/data/model. The last line is
one JSON object: {"cases": n, "equal": m, "failed": [ids]}.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.golden_model import DATA, unpack_mask
from helpers.recipe_images import crc, make_image
from llava.analysis.attention import (
    KINDS,
    AttentionSample,
    Records,
    UnreadableSample,
    analyze,
    top_mask,
)
from llava.analysis.attention.reader import AttentionReader
from llava.analysis.attention.statistics import AttentionStatistics
from llava.analysis.questions import read_question_file
from llava.eval.benchmarks import Question
from llava.eval.jobs.job import Task, common_anyres, resolve_job
from llava.eval.jobs.session import Session
from llava.model.checkpoint.config import stored_config

RELATIVE, ABSOLUTE, CDF, ENTROPY = 2e-4, 1e-8, 2e-5, 5e-5


class Mismatch(AssertionError):
    """What differs from the reference."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Mismatch(what)


def expect_close(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    found, wanted = np.asarray(found, float), np.asarray(wanted, float)
    expect(found.shape == wanted.shape, f"{what}: shape {found.shape}, expected {wanted.shape}")
    bad = ~(np.abs(found - wanted) <= ABSOLUTE + RELATIVE * np.abs(wanted))  # NaN is bad
    expect(not bad.any(), f"{what}: {bad.sum()} of {bad.size} values differ")


def expect_mask(mask: np.ndarray, wanted: dict, count: int, what: str) -> None:
    reference = unpack_mask(wanted["mask"], len(mask))
    differing = set(np.flatnonzero(mask != reference).tolist())
    expect(mask.sum() == count, f"{what}: {mask.sum()} tokens, expected {count}")
    expect(differing <= set(wanted["near"]), f"{what}: tokens {sorted(differing)} differ")


def check_sample(sample: AttentionSample, prompt: str, ids: list[int], case: dict, arrays: dict) -> None:
    expect(prompt == case["prompt"], f"prompt {prompt!r}")
    expect(list(ids) == case["input_ids"], f"input_ids {ids}")
    facts = {
        "visual_start": sample.visual_start,
        "n_visual": len(sample.cls),
        "seq_len": sample.length,
        "text_rows": sample.text_rows,
        "first_new_id": sample.first_new_id,
    }
    for name, value in facts.items():
        expect(value == case[name], f"{name} is {value}, expected {case[name]}")
    for kind in KINDS:
        expect_close(getattr(sample, kind), arrays[f"{case['id']}|{kind}"], kind)
    for kind, layers in case["top_quarter"].items():
        vectors, count = sample.layers(kind), len(sample.cls) // 4
        expect(len(layers) == len(vectors), f"{kind}: {len(vectors)} layers, expected {len(layers)}")
        for layer, (mask, wanted) in enumerate(zip(top_mask(vectors, count), layers, strict=True)):
            expect_mask(mask, wanted, count, f"top_quarter {kind} {layer}")
    for name, by_kind in case.items():
        if not (name.startswith("top") and "_layer" in name):
            continue
        budget, _, layer = name.removeprefix("top").partition("_layer")
        for kind, wanted in by_kind.items():
            vectors = sample.layers(kind)
            mask = top_mask(vectors, int(budget))[0 if kind == "cls" else int(layer)]
            expect_mask(mask, wanted, int(budget), f"{name} {kind}")


def check_frequency(found: AttentionStatistics, kind: str, group: dict, counts: np.ndarray) -> None:
    wanted = group["frequency"][kind]
    curves = found.curves[kind]
    expect(wanted["k"] == curves.tokens // 4, f"k is {curves.tokens // 4}, expected {wanted['k']}")
    slack = np.zeros(curves.counts.shape, int)
    for place, allowed in wanted["slack"].items():
        slack[tuple(map(int, place.split(",")))] = allowed
    expect(counts.shape == curves.counts.shape, f"shape {curves.counts.shape}, expected {counts.shape}")
    wrong = np.abs(curves.counts - counts.astype(int)) > slack
    expect(not wrong.any(), f"{wrong.sum()} counts differ")
    expect((curves.counts.sum(1) == wanted["k"] * found.samples).all(), "sums of counts")
    expect(np.allclose(curves.frequency, curves.counts / group["samples"]), "frequency")


def check_quartiles(found: AttentionStatistics, kind: str, group: dict) -> None:
    wanted = group["quartiles"][kind]
    gap = np.abs(found.curves[kind].quartiles - np.array(wanted["proportion"]))
    expect((gap <= np.array(wanted["tolerance"])[:, None] + 1e-9).all(), f"largest difference {gap.max()}")


def check_cdf(found: AttentionStatistics, kind: str, group: dict) -> None:
    wanted = np.array([layer["cdf"] for layer in group["dispersion"][kind]])
    gap = np.abs(found.curves[kind].cumulated(np.linspace(0, 1, wanted.shape[1])) - wanted)
    expect(gap.max() <= CDF, f"largest difference {gap.max()}")


def check_entropy(found: AttentionStatistics, kind: str, group: dict) -> None:
    curves = found.curves[kind]
    for layer, wanted in enumerate(group["dispersion"][kind]):
        gaps = [
            np.abs(curves.entropies[layer] - np.array(wanted["entropy"])).max(),
            abs(curves.entropy[layer] - wanted["entropy_mean"]),
            abs(curves.relative_entropy[layer] - wanted["entropy_over_ln_n"]),
        ]
        expect(max(gaps) <= ENTROPY, f"layer {layer}: largest difference {max(gaps)}")


def check_density(found: AttentionStatistics, kind: str, group: dict) -> None:
    curves = found.curves[kind]
    for layer, wanted in enumerate(group["dispersion"][kind]):
        gap = abs(curves.maximum[layer] / wanted["maximum"] - 1)
        expect(gap <= RELATIVE, f"layer {layer}: maximum {curves.maximum[layer]}, not {wanted['maximum']}")
        counts = np.array(wanted["counts"])
        expect(len(counts) == curves.density.shape[1], f"{curves.density.shape[1]} bins, not {len(counts)}")
        moved = np.abs(curves.density[layer] - counts).sum()
        expect(moved <= 2 * wanted["slack"], f"layer {layer}: {moved} values in other bins")


CHECKS = {
    "quartiles": check_quartiles,
    "cdf": check_cdf,
    "entropy": check_entropy,
    "density": check_density,
}


def find_checkpoint(folder: Path, name: str) -> Path:
    places = [folder / name, folder.parent / "model" / name, DATA / name]
    return next((place for place in places if (place / "config.json").is_file()), places[-1])


def write_images(images: dict, questions: list[Question]) -> None:
    """Make the images that questions name, whatever the ending of their names."""
    for file in {question.image for question in questions}:
        image = images[file.stem]
        pixels = make_image(*image["size"], image["seed"])
        if crc(pixels) != image["u8_crc"]:
            raise SystemExit(f"images: {file.stem} differs from its checksum. Use the recipe of the folder.")
        Image.fromarray(pixels).save(file, format="PNG")


def make_reader(folder: Path, group: dict, questions: list[Question]) -> AttentionReader:
    """Load the checkpoint of a group."""
    model = find_checkpoint(folder, group["ckpt"])
    config = stored_config(model, None)
    anyres = common_anyres(config, None)
    job = resolve_job(model, config, device="cpu", conv_mode=group["conv"], anyres=anyres)
    return AttentionReader(Session(job).engine(Task(questions)))


def run_group(name: str, group: dict, folder: Path, images: dict, cases: list[dict], arrays: dict):
    """Yield (id, None or what differs) of every entry of a group."""
    with tempfile.TemporaryDirectory() as scratch, Records(Path(scratch, "records.bin"), {}) as records:
        issues: list = []
        questions = read_question_file(folder / group["questions"], Path(scratch), issues)
        if issues:
            raise SystemExit("\n".join(map(str, issues)))
        write_images(images, questions)
        reader = make_reader(folder, group, questions)
        by_id = {str(question.question_id): question for question in questions}

        def check(case: dict) -> None:
            question = by_id[case["id"].partition("/")[2]]
            sample = reader.read(question)
            records.append(question.index, sample)
            engine = reader.engine
            check_sample(sample, engine.prompt(question), engine.prompt_ids(question), case, arrays)

        for case in cases:
            yield f"sample/{case['id']}", outcome(check, case)
        try:
            found = analyze(records.samples(question.index for question in questions))
        except ValueError as error:  # no sample could be read
            raise SystemExit(f"{name}: {error}") from error
    for kind in KINDS:
        wanted = arrays[f"{name}|mean_{kind}"]
        means = found.means[kind].reshape(wanted.shape)
        yield f"mean/{name}/{kind}", outcome(expect_close, means, wanted, "mean")
    for kind in group["frequency"]:
        counts = arrays[f"{name}|count_{kind}"]
        yield f"frequency/{name}/{kind}", outcome(check_frequency, found, kind, group, counts)
        for check_name, function in CHECKS.items():
            yield f"{check_name}/{name}/{kind}", outcome(function, found, kind, group)


def outcome(check, *args) -> str | None:
    try:
        check(*args)
    except (Mismatch, KeyError, UnreadableSample) as error:
        return f"{type(error).__name__}: {error}"
    return None


def run(folder: Path) -> dict[str, object]:
    """Return {"cases", "equal", "failed"} of a folder; print what differs on standard error."""
    document = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    with np.load(folder / "analysis_arrays.npz") as file:
        arrays = {key: file[key] for key in file.files}
    failed, count = [], 0
    for name, group in document["groups"].items():
        cases = [case for case in document["samples"] if case["group"] == name]
        for identity, reason in run_group(name, group, folder, document["images"], cases, arrays):
            count += 1
            if reason is not None:
                failed.append(identity)
                print(f"{identity}: {reason}", file=sys.stderr)
    return {"cases": count, "equal": count - len(failed), "failed": failed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    found = run(parser.parse_args(argv).folder)
    print(json.dumps(found))
    return 1 if found["failed"] or not found["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""What scores do not show: tokens that two settings both keep, answers that change, answers about positions.

The kept tokens are written beside the answers as kept.json, so that a finished ablation loads no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.analysis.ablation.report import Interval
from llava.eval.jobs.execute import SettingRun
from llava.eval.jobs.job import Task
from llava.eval.jobs.session import Session
from llava.eval.metrics.statistics import resampled_sums
from llava.eval.store.atomic import write_atomically

KEPT = "kept.json"
_WHERE = re.compile(r"\b(left|right|above|below|where)\b", re.IGNORECASE)
Kept = dict[str, list[list[int]]]  # image -> kept patches of each crop


def images_of(task: Task) -> list[Any]:
    """Return the images of the asked questions, each once."""
    return list(dict.fromkeys(one.image for one in task.asked if one.image is not None))


def kept_tokens(session: Session, task: Task, runs: Sequence[SettingRun]) -> list[Kept]:
    """Return what every setting keeps of every image; what kept.json does not have is selected now.

    Raises:
        ModelError: The model cannot be loaded.
    """
    found = [_read(run) for run in runs]
    images = images_of(task)
    for run, kept in zip(runs, found, strict=True):
        missing = [image for image in images if _name(image) not in kept]
        if not missing:
            continue
        engine = session.engine(task, run.batch_size)
        with torch.inference_mode():
            for image, features in engine.encoded(missing, run.pruner):
                tokens = engine.model.visual_tokens(features, run.pruner)
                kept[_name(image)] = tokens.kept.indices.tolist()
        document = {"config": run.configuration.hash(), "kept": kept}
        write_atomically(run.folder / KEPT, json.dumps(document) + "\n")
    return found


def _read(run: SettingRun) -> Kept:
    """Return what an earlier start of this configuration kept; {} without a file that can be used."""
    try:
        document = json.loads((run.folder / KEPT).read_bytes())
        return dict(document["kept"]) if document["config"] == run.configuration.hash() else {}
    except (OSError, ValueError, KeyError, TypeError):  # it is written again
        return {}


def _name(image: Any) -> str:
    return Path(image).name if isinstance(image, str | Path) else str(image)


def kept_iou(a: Kept, b: Kept, iterations: int, seed: int) -> Interval:
    """Return the mean over images of the intersection over union of kept tokens, with its 95% interval.

    Raises:
        ValueError: No image is in both.
    """
    values = []
    for image in sorted(a.keys() & b.keys()):
        sets = [{(crop, patch) for crop, row in enumerate(one[image]) for patch in row} for one in (a, b)]
        union = len(sets[0] | sets[1])
        values.append([len(sets[0] & sets[1]) / union if union else 1.0, 1.0])
    return _mean(values, iterations, seed, "no image is in both")


def changed_answers(a: Path, b: Path, task: Task, iterations: int, seed: int) -> Interval:
    """Return the share of questions to which two answer files give different texts, with its 95% interval.

    The interval resamples images.

    Raises:
        ValueError: No question is in both.
    """
    texts = [_texts(path) for path in (a, b)]
    per_image: dict[Any, list[float]] = {}
    for question in task.asked:
        if question.index in texts[0] and question.index in texts[1]:
            counts = per_image.setdefault(question.image, [0.0, 0.0])
            counts[0] += texts[0][question.index] != texts[1][question.index]
            counts[1] += 1
    return _mean(list(per_image.values()), iterations, seed, "no question is in both")


def accuracy_where(task: Task, run: SettingRun, iterations: int, seed: int) -> Interval | None:
    """Return the accuracy on questions about positions, with its 95% interval; None if there are none."""
    asked = {one.index for one in task.asked if _WHERE.search(one.text)}
    rows = task.benchmark.read_answers(run.answers)
    rows = [row for row in rows if row["metadata"]["index"] in asked]
    if not rows:
        return None
    per_image: dict[str, list[float]] = {}
    for mark in task.benchmark.question_scores(task.folder, rows):
        counts = per_image.setdefault(mark.image, [0.0, 0.0])
        counts[0] += mark.value
        counts[1] += 1
    return _mean(list(per_image.values()), iterations, seed, "no question about positions is scored")


def _texts(path: Path) -> dict[int, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {row["metadata"]["index"]: row["text"] for row in map(json.loads, lines)}


def _mean(counts: Sequence[Sequence[float]], iterations: int, seed: int, nothing: str) -> Interval:
    """Return sum / number of (images, 2) counts, with the percentile interval over resampled images."""
    if not counts:
        raise ValueError(nothing)
    table = np.array(counts, dtype=np.float64)
    sums = resampled_sums(table, iterations, seed)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    whole = table.sum(0)
    return Interval(float(whole[0] / whole[1]), float(low), float(high))

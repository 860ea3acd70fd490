"""Methods of other packages, which entry points name: installed from a wheel, used, and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCE = """
from llava.pruning import Pruner


class LargestNorm(Pruner):
    def score(self, features, cues):
        return features.double().norm(dim=-1)
"""
USE = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    from llava.pruning import get_pruner, list_pruners
    names = list_pruners()
features = torch.arange(8.0).view(1, 8, 1)
kept = get_pruner("norm", tokens=3).select(features, torch.ones(1, 1, 8)) if "norm" in names else None
kept = None if kept is None else kept.tolist()
print(json.dumps({"names": names, "kept": kept, "warnings": [str(one.message) for one in found]}))
"""


def build_wheel(folder: Path, points: str) -> Path:
    """Write a wheel of one module with entry points, without a build backend."""
    path, info = folder / "vispruner_norm-1.0-py3-none-any.whl", "vispruner_norm-1.0.dist-info"
    files = {
        "vispruner_norm.py": SOURCE,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: vispruner-norm\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[vispruner.methods]\n{points}\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def installed(tmp_path: Path, points: str) -> dict:
    wheel, target = build_wheel(tmp_path, points), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    paths = [str(target), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_an_installed_package_adds_a_method(tmp_path: Path) -> None:
    found = installed(tmp_path, "norm = vispruner_norm:LargestNorm")
    assert "norm" in found["names"] and found["kept"] == [[5, 6, 7]] and not found["warnings"]


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ("norm = vispruner_norm:Missing", "AttributeError"),
        ("norm = vispruner_norm:Pruner.select", "expected a subclass of llava.pruning.Pruner"),
        ("vispruner = vispruner_norm:LargestNorm", "pruner 'vispruner' already exists"),
    ],
)
def test_a_method_that_cannot_be_used_is_named_and_left_out(tmp_path: Path, points: str, reason: str) -> None:
    found = installed(tmp_path, points)
    assert "norm" not in found["names"] and "vispruner" in found["names"]
    (said,) = found["warnings"]
    assert "package 'vispruner-norm'" in said and reason in said

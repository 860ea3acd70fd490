"""The scripts of docs/vispruner_plus.md: shared selections equal separate ones; scores and differences."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts" / "vispruner_plus"
PROGRAM = """
import sys
import numpy as np
import torch

sys.path.insert(0, sys.argv[1])
import candidates  # registers methods, so it stays in a process of its own
import differences
from llava.pruning import get_pruner

generator = torch.Generator().manual_seed(0)
features = torch.randn(2, 90, 16, generator=generator)
attention = torch.rand(2, 3, 90, generator=generator)
cues = {"projected": features[:, :, :8] + 0}
names = "vispruner scope score-half divprune_cen fl2 fl2-spread css far-a-u vispruner+".split()
wanted = {(m, t): get_pruner(m, t).keep(features, attention, cues=cues) for m in names for t in (5, 9, 70)}
same = get_pruner("fl2-proj-unlike", 9).keep(features, attention, cues=cues).indices
assert torch.equal(same, wanted["vispruner+", 9].indices)
candidates.remember_selections()
for (method, tokens), kept in wanted.items():
    for rows in (slice(None), slice(1, 2)):
        own = {"projected": cues["projected"][rows]}
        found = get_pruner(method, tokens).keep(features[rows], attention[rows], cues=own)
        assert torch.equal(found.indices, kept.indices[rows]), (method, tokens)
        assert torch.equal(found.important, kept.important[rows]), (method, tokens)

assert differences.split("vispruner-r0.5-32") == ("vispruner-r0.5", "32")
assert differences.bare("score-half-exponent=0.5") == "score-half"
files = "TINY_val_000000000007.webp", "TINY_val_000000000007", "7"
assert {differences.image_key(name) for name in files} == {"7"}
scores = {f"{m}-16": {"pope": np.array([s, s - 1, s + 1.0])} for m, s in (("a", 3.0), ("b", 1.0))}
report = differences.report(differences.mean_of([scores, scores]), ["a"])
assert report["16"]["differences"]["a - b"]["pope"] == [2.0, 2.0, 2.0]
assert report["16"]["scores"]["a"]["pope"][0] == 3.0
"""


def test_the_scripts():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(SCRIPTS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr

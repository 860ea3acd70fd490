"""docs/hosts.md, the tour and the lines of README.md are what the code does."""

from __future__ import annotations

import json
import re

import pytest

import llava
from helpers.notebook import run_cells
from llava.integrations import table
from llava.integrations.hosts import supported_classes
from llava.integrations.tiny_hosts import HOSTS
from llava.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "hosts.md"


def test_the_table_of_hosts_is_what_the_descriptors_say(tmp_path, capsys):
    page = PAGE.read_text(encoding="utf-8")
    assert table.with_table(page, str(PAGE)) == page, (
        "docs/hosts.md is outdated. Run: python -m llava.integrations.table --write docs/hosts.md"
    )
    listed = set(re.findall(r"^\| (\w+)(?: \(\w+\))? \| (?:yes|-)", page, re.MULTILINE))
    assert listed == {case.class_name.removesuffix("ForConditionalGeneration") for case in HOSTS.values()}
    rows = {line.split(" | ")[0]: line.split(" | ") for line in table.table_lines()}
    column = {name.strip("`"): i for i, name in enumerate(rows["| class of transformers"])}
    for name in ("llava", "qwen3_vl", "llava_next_video"):  # cells against what `llava.prune` does
        model = HOSTS[name].build()
        row = rows["| " + HOSTS[name].class_name.removesuffix("ForConditionalGeneration")]
        for method in ("vispruner", "visionzip", "downsample"):
            try:
                llava.prune(model, method, tokens=4)
                llava.unprune(model)
                assert row[column[method]] != "-"
            except ValueError:
                assert row[column[method]] == "-"
    unmarked = tmp_path / "page.md"
    unmarked.write_text("no marks")
    with pytest.raises(SystemExit) as caught:
        table.main(["--write", str(unmarked)])
    assert caught.value.code == 1 and "page.md: no lines" in capsys.readouterr().err


def test_every_supported_class_but_variants_has_a_tiny_host():
    without = set(supported_classes()) - {case.class_name for case in HOSTS.values()}
    same = {
        "VipLlavaForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    }  # as their parent classes
    assert without == same


def test_the_lines_of_the_readme_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text("utf-8"), re.DOTALL)
    (lines,) = [block for block in blocks if "tiny_hosts" in block]
    exec(lines, {})
    assert len(json.loads(capsys.readouterr().out)) == 8


def test_the_tour_prints_what_it_is_committed_with():
    file = REPOSITORY / "docs" / "tour.ipynb"
    notebook = json.loads(file.read_text(encoding="utf-8"))
    stored = [
        "".join(line for out in cell["outputs"] for line in out["text"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]
    assert file.stat().st_size < 20_000 and all(stored)
    printed = run_cells(notebook)
    # Libraries of other machines may round a tie of the bundled model another way
    assert [len(text.splitlines()) for text in printed] == [len(text.splitlines()) for text in stored]
    assert [text for text in printed if "o" not in text[:9]][-1:] == stored[-1:] == ["True\n"]
    scores = [float(line.split()[-1]) for line in printed[3].splitlines()]
    assert scores[0] > 90 and scores[2] > scores[1]

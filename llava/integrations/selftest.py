"""Check that pruning a host model equals what it stands for, and print the largest differences of logits.

    python -m llava.integrations.selftest                      # tiny random models of all classes
    python -m llava.integrations.selftest --host qwen2_5_vl
    python -m llava.integrations.selftest --model PATH         # a checkpoint, on one synthetic image

keep all    pruning that drops nothing, against the unpruned model
masked      pruned, against the unpruned model with the dropped places masked, at the same positions
batch       the prompt padded in a batch with a longer one, against the prompt alone
cached      logits of generated tokens, against a forward pass of the grown prompt
unprune     after pruning was undone, against before

Everything is in float32. A line per model ends in ok or FAILED, the last line is JSON, and the exit code is 1
if one failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

TOLERANCE = 1e-5  # of logits, relative to the largest or to 4; rounding of a few layers in float32
DEEP = 100  # times that for a checkpoint, which has many layers


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m llava.integrations.selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--host", metavar="NAME", help="tiny model to check, such as qwen2_5_vl (default: all)"
    )
    group.add_argument(
        "--model", metavar="PATH", help="checkpoint of transformers to check: a folder or owner/name"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    import transformers

    from llava.integrations import equivalence
    from llava.integrations.equivalence import CHECKS
    from llava.integrations.hosts.base import UnsupportedRelease
    from llava.integrations.tiny_hosts import HOSTS
    from llava.model.checkpoint.find import local_folder

    if args.host is not None and args.host not in HOSTS:
        parser.error(f"--host {args.host!r}: unknown (choose from {', '.join(HOSTS)})")
    if args.model is not None:
        try:
            local_folder(args.model)
        except FileNotFoundError as error:
            parser.error(f"--model {error}")
    results: dict[str, dict[str, float | None]] = {}
    failed: list[str] = []
    skipped: list[str] = []
    print(f"{'':30}" + "".join(f"{name:>10}" for name in CHECKS))
    names = [args.model] if args.model else [args.host] if args.host else list(HOSTS)
    for name in names:
        if args.model:
            try:
                model, inputs = equivalence.read_checkpoint(args.model)
            except (OSError, ValueError, TypeError, ImportError) as error:
                parser.exit(1, f"error: {error}\n")
        else:
            model, inputs = HOSTS[name].build(), HOSTS[name].batches()["single"]
        try:
            found = equivalence.check_host(model, inputs)
        except UnsupportedRelease as error:
            skipped.append(name)
            print(f"{name:30}  skipped: {error}")
            continue
        limit = TOLERANCE * (DEEP if args.model else 1)
        good = all(value is None or value <= limit for value in found.values())
        failed += [] if good else [name]
        results[name] = found
        cells = "".join(f"{'-' if found[check] is None else f'{found[check]:.1e}':>10}" for check in CHECKS)
        print(f"{name:30}{cells}  {'ok' if good else 'FAILED'}", flush=True)
    document = {"transformers": transformers.__version__, "differences": results}
    print(json.dumps({**document, "skipped": skipped, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

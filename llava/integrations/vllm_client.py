"""Ask a vLLM server about images, with visual tokens that are pruned here.

    vllm serve llava-hf/llava-1.5-7b-hf --enable-mm-embeds --chat-template vicuna_v1.jinja
    python -m llava.integrations.vllm_client --server http://localhost:8000 --tokens 64 \\
        --model liuhaotian/llava-v1.5-7b --image view.jpg --question "What is this?"

The local checkpoint, without its decoder, encodes and prunes; the server, which must have the same weights,
runs the language model on the tokens that are left. Prints the answer. `--print-template vicuna_v1` prints
the chat template for the server. Whole benchmarks are asked with `python -m llava.eval.run --server`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava import argtypes
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.eval import cli
from llava.eval.benchmarks import DataError
from llava.eval.jobs.job import Task, resolve_pruner
from llava.eval.jobs.session import Session
from llava.eval.run_llava import open_image, prompt_row
from llava.model.checkpoint.config import stored_config

_PRINT = "--print-template"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    form = argparse.RawDescriptionHelpFormatter
    name = "python -m llava.integrations.vllm_client"
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--image", nargs="+", required=True, metavar="FILE", help="paths or addresses of images")
    add("--question", default="Describe this image in detail.", help="(default: %(default)s)")
    add("--model", help="local checkpoint, folder or Hugging Face name (default: the bundled model)")
    add("--model-base", help="base checkpoint of a LoRA or projector-only folder")
    add("--method", help="pruning method (default: vispruner, none without --tokens)")
    budget = (
        "visual tokens to keep per crop, none disables pruning (default: VISPRUNER_TOKENS, else config.json, "
    )
    add("--tokens", type=argtypes.tokens, metavar="N|none", help=f"{budget}else none)")
    add("--ratio", type=argtypes.ratio, help="share selected by [CLS] attention (default: 0.5)")
    add("--max-new-tokens", type=argtypes.at_least(1), help="tokens of the answer (default: 128)")
    add(_PRINT, metavar="CONV_MODE", help="print the chat template for the server, and do nothing else")
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser)
    cli.add_server_arguments(parser, required=True)
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    argv, parser = list(sys.argv[1:] if argv is None else argv), build_parser()
    if any(text.partition("=")[0] == _PRINT for text in argv):
        for action in parser._actions:
            action.required = False
    args = parser.parse_args(argv)
    from llava.eval.inference.server import Prompt, Reply, chat_template
    from llava.model.decode import stop_ids

    if args.print_template is not None:
        try:
            print(chat_template(args.print_template))
        except ValueError as error:
            parser.error(f"{_PRINT} {error}")
        return 0
    for mark in (IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN):
        if mark in args.question:
            parser.error(
                f"--question: contains {mark}. The server puts all images before the question; remove it"
            )
    images = [open_image(file) for file in args.image]
    model = cli.model_folder(args, parser)
    try:
        config = stored_config(model, args.model_base)
        pruner, anyres = resolve_pruner(
            config, args.method, args.tokens, args.ratio, args.anyres, args.seed, args.preset
        )
        job = cli.with_server(cli.job_of(args, model, config, anyres), pruner, args.server, args.server_model)
    except ValueError as error:
        parser.error(str(error))
    cli.print_warnings(job.warnings)
    session = Session(job)
    engine = session.engine(Task(()))
    session.check_method(pruner)
    row = prompt_row(engine, job, pruner, images, args.question)
    prompt = Prompt(args.question, row, job.seed)
    (reply,) = engine.server.generate([prompt], engine.decoding, stop_ids(engine.model, engine.tokenizer))
    if not isinstance(reply, Reply):
        raise DataError(str(reply))
    counts = " + ".join(str(len(one)) for one in row.images)
    print(f"{counts} visual tokens, {row.length} tokens in the prompt", file=sys.stderr)
    ids = reply.ids
    print(
        reply.text.strip() if ids is None else engine.tokenizer.decode(ids, skip_special_tokens=True).strip()
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

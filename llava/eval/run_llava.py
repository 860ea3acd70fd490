"""Ask one question about one or several images or videos, as LLaVA's quick start does.

    python -m llava.eval.run_llava --model-path CHECKPOINT --image-file view.jpg --query "What is this?"

    from llava.eval.run_llava import eval_model
    eval_model(args)    # an object with model_path, image_file, query, and what differs from the defaults

Prints the answer. Every image is put before the question, or where <image-placeholder> stands in it. A
Video-LLaVA in its original layout also takes videos: --image-file clip.mp4 (docs/video.md). Without
--conv-mode the template follows from the checkpoint's name, as in LLaVA. Questions about many images are
asked by `model_vqa_loader` and `run`.
"""

from __future__ import annotations

if not __package__:  # run by its path, as in LLaVA's documents: import this repository
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import os
import sys
from collections.abc import Sequence
from http.client import HTTPException
from io import BytesIO
from typing import TYPE_CHECKING, Any, NoReturn

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates, template_for_name
from llava.eval import cli, model_vqa_loader
from llava.eval.benchmarks import DataError, Question
from llava.eval.jobs.job import Task, model_name
from llava.eval.jobs.session import Session
from llava.model.checkpoint.config import conversation_for, stored_config

if TYPE_CHECKING:
    from PIL import Image

    from llava.eval.jobs.job import Job
    from llava.model.decode import Row
    from llava.pruning import Pruner

_URL = ("http://", "https://")
_TIMEOUT = 60  # seconds, of a download
# attributes of `eval_model`'s argument; the first three are required
_REQUIRED = ("model_path", "image_file", "query")
_OPTIONAL = (
    *("model_base", "conv_mode", "sep", "temperature", "top_p", "num_beams", "max_new_tokens"),
    *("visual_token_num", "important_ratio"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("run_llava", __doc__)
    add = parser.add_argument
    add(
        "--image-file",
        required=True,
        help="path or address of an image, or path of a video; several are separated by --sep",
    )
    add("--query", required=True, help="question")
    add("--sep", default=",", help="separator of several images (default: a comma)")
    model_vqa_loader.add_llava_arguments(parser, None, 512)
    return parser


def eval_model(args: Any) -> None:
    """Print the answer to a question about images.

    Args:
        args: Object with the attributes model_path, image_file and query, and optionally model_base,
            model_name, conv_mode, sep, temperature, top_p, num_beams, max_new_tokens, visual_token_num and
            important_ratio; those that are missing or None have the defaults of the command.

    Raises:
        DataError: An attribute is missing or invalid, or an image cannot be read.
        MethodUnavailable: The model does not have what the pruning method reads.
        ModelError: The checkpoint cannot be loaded.
    """
    if isinstance(args, dict):
        raise DataError("eval_model: args is a dict. Pass an object, such as types.SimpleNamespace(**args).")
    missing = [name for name in _REQUIRED if getattr(args, name, None) is None]
    if missing:
        listed = ", ".join((*_REQUIRED, *_OPTIONAL))
        raise DataError(f"eval_model: args has no {', '.join(missing)}. Set them; known are {listed}.")
    argv = []
    for name in (*_REQUIRED, *_OPTIONAL):
        value = getattr(args, name, None)
        if value is None:
            continue
        if not isinstance(value, str | int | float | os.PathLike):
            raise DataError(f"eval_model: args.{name} is {value!r}, expected a text or a number.")
        flag = name if name in ("visual_token_num", "important_ratio") else name.replace("_", "-")
        argv.append(f"--{flag}={value}")
    parser = build_parser()

    def refuse(message: str) -> NoReturn:
        raise DataError(f"eval_model: {message}")

    parser.error = refuse  # type: ignore[method-assign]
    print(_answer(parser.parse_args(argv), parser, getattr(args, "model_name", None)))


def _answer(args: argparse.Namespace, parser: argparse.ArgumentParser, name: str | None = None) -> str:
    """Return the answer; everything but the model is checked before it is loaded."""
    if not args.sep:
        parser.error("--sep: empty. Give the text between two images, such as ','")
    files = args.image_file.split(args.sep)
    if not all(files):
        parser.error(f"--image-file {args.image_file!r}: an empty name between separators {args.sep!r}")
    if DEFAULT_IMAGE_TOKEN in args.query:
        fix = f"Use {IMAGE_PLACEHOLDER} where an image belongs, or nothing"
        parser.error(f"--query: contains {DEFAULT_IMAGE_TOKEN}, which is added here. {fix}")
    places = args.query.count(IMAGE_PLACEHOLDER)
    if places not in (0, len(files)):
        parser.error(f"--query: {places} {IMAGE_PLACEHOLDER} for {len(files)} images. Give one for each")
    model = cli.model_folder(args, parser, "--model-path")
    try:
        config = stored_config(model, args.model_base)
        pruner, anyres = cli.pruner_of(args, config)
        by_config = conversation_for(config, model_name(model))
        # LLaVA's rule for names knows no Video-LLaVA and no SmolLM2, which have one template
        only_one = bool(config.get("mm_video_tower")) or by_config == "chatml_direct"
        by_name = by_config if only_one else template_for_name(name or model_name(model))
        warnings = _template_warnings(args, by_name, by_config, name)
        args.conv_mode = args.conv_mode or by_name
        job = cli.job_of(args, model, config, anyres)
    except ValueError as error:
        parser.error(str(error))
    images = [open_medium(file, config) for file in files]
    cli.print_warnings(warnings)
    return _generate(job, pruner, images, args.query)


def _template_warnings(args: argparse.Namespace, by_name: str, by_config: str, name: str | None) -> list[str]:
    """Return a warning if the template is not that of the name, or is of another kind than config.json's."""
    if args.conv_mode is not None:
        if args.conv_mode == by_name or args.conv_mode not in conv_templates:
            return []
        what = f"--conv-mode {args.conv_mode}: the checkpoint's name calls for {by_name}"
        return [f"{what}. {args.conv_mode} is used"]
    chosen, expected = conv_templates[by_name], conv_templates[by_config]
    if (chosen.sep_style, tuple(chosen.roles)) == (expected.sep_style, tuple(expected.roles)):
        return []  # they differ in the system prompt at most
    what = f"the checkpoint's name {name or model_name(args.model)!r} calls for the template {by_name}"
    return [f"{what}, its config.json for {by_config}. Use --conv-mode {by_config} if the answer is poor"]


def open_medium(file: str, config: dict[str, Any]) -> Image.Image | list[Image.Image]:
    """Open what a model is asked about: an image, or the frames of a video.

    GIF files are videos for a model that takes videos, and images for others.

    Args:
        config: Content of the checkpoint's config.json.

    Raises:
        OSError: No such file, or no answer from the address.
        DataError: It cannot be read, or the model does not take it.
        ImportError: PyAV is not installed.
    """
    from llava.video_files import SUFFIXES, read_frames

    takes_videos = bool(config.get("mm_video_tower"))
    if not file.lower().endswith(SUFFIXES) or (file.lower().endswith(".gif") and not takes_videos):
        if takes_videos and not config.get("mm_image_tower"):
            raise DataError(f"{file}: an image, but config.json names no mm_image_tower. Pass a video.")
        return open_image(file)
    if not takes_videos:
        raise DataError(
            f"{file}: a video, but the model takes images only (config.json names no mm_video_tower). Use a "
            "Video-LLaVA in its original layout."
        )
    if file.startswith(_URL):
        raise DataError(f"{file}: videos are not downloaded. Download it and pass its path.")
    try:
        return read_frames(os.path.expanduser(file))
    except ValueError as error:
        raise DataError(str(error)) from error


def open_image(file: str) -> Image.Image:
    """Open an image file or download it (http, https), as RGB.

    Raises:
        OSError: No such file, or no answer from the address.
        ValueError: Not an image.
    """
    from llava.image_files import decode_image, load_image

    try:
        if file.startswith(_URL):
            return decode_image(BytesIO(_download(file)), file)
        return load_image(os.path.expanduser(file))
    except ValueError as error:
        raise DataError(str(error)) from error


def _download(address: str) -> bytes:
    from urllib.request import Request, urlopen

    try:
        # Many servers refuse Python's own name.
        request = Request(address, headers={"User-Agent": "Mozilla/5.0 (vispruner)"})
        with urlopen(request, timeout=_TIMEOUT) as response:
            return response.read()
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise OSError(
            f"{address}: cannot be downloaded ({reason}). Download it and pass its path."
        ) from error


def prompt_row(
    engine: Any, job: Job, pruner: Pruner, images: Sequence[Image.Image | list[Image.Image]], query: str
) -> Row:
    """Return the prompt of a question about images or videos, with their pruned visual tokens.

    Args:
        engine: Of the job's session.
        images: Images, and lists of frames.
        query: Question, with IMAGE_PLACEHOLDER for every image or none.

    Raises:
        DataError: The prompt is too long.
    """
    import torch

    from llava.mm_utils import media_tags, process_images, tokenizer_image_token
    from llava.model.clips import join_frame_tags
    from llava.model.decode import Row
    from llava.model.splice import ContextLimits

    model, tokenizer = engine.model, engine.tokenizer
    video = model.get_video_tower()
    clips = {} if video is None else {"clip_budget": job.clip_budget}
    model.set_pruner(pruner, anyres=job.anyres or "auto", **clips)
    counts = [len(one) if isinstance(one, list) else 1 for one in images]  # of tags
    tags = [
        media_tags([isinstance(one, list)], model.config, count)
        for one, count in zip(images, counts, strict=True)
    ]
    if IMAGE_PLACEHOLDER in query:
        first, *rest = query.split(IMAGE_PLACEHOLDER)
        text = first + "".join(tag + part for tag, part in zip(tags, rest, strict=True))
    else:  # Video-LLaVA's tags are in one line
        text = "".join(f"{tag}\n" for tag in (tags if video is None else ["".join(tags)])) + query
    conversation = conv_templates[job.conv_mode].copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX)
    ids = tuple(join_frame_tags(ids, counts) or ids)  # frames of a clip have one tag together
    question = Question(0, 0, None, query.replace(IMAGE_PLACEHOLDER, "").strip())
    with torch.inference_mode():
        cue = engine.text_cue(question) if pruner.needs_question else None
        pixels = process_images(images, engine.image_processor, model.config)
        sizes = [(one[0] if isinstance(one, list) else one).size for one in images]
        visions = model.encode_vision(list(pixels), sizes)
        tokens = [model.visual_tokens(one, question=cue) for one in visions]
    visual = tuple(one.embeds for one in tokens)
    first, limits = tokens[0], ContextLimits.of(model.config)
    row = Row(ids, visual, crops=len(first.kept.indices), places=first.places, span=first.span)
    if reason := limits.refuse(row.length, sum(map(len, visual))):
        raise DataError(f"--query: {reason}.")
    return row


def _generate(job: Job, pruner: Pruner, images: Sequence[Image.Image | list[Image.Image]], query: str) -> str:
    """Load the model and return its answer."""
    session = Session(job)
    engine = session.engine(Task(()))
    session.check_method(pruner)
    import torch

    from llava.eval.inference.engine import not_finite
    from llava.model.decode import generate
    from llava.model.splice import ContextLimits

    model, tokenizer = engine.model, engine.tokenizer
    row = prompt_row(engine, job, pruner, images, query)
    torch.manual_seed(job.seed)
    try:
        (answer,) = generate(model, tokenizer, [row], engine.decoding, pruner)
    except ValueError as error:  # a method inside the language model that cannot do this
        raise DataError(str(error)) from error
    limits = ContextLimits.of(model.config)
    reason = not_finite(model) if answer is None else limits.overrun(row.length, len(answer))
    if reason is not None:
        raise DataError(f"--query: {reason}.")
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    print(_answer(parser.parse_args(argv), parser))
    return 0


if __name__ == "__main__":
    sys.exit(main())

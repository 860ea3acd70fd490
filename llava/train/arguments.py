"""The arguments of training: LLaVA's names and defaults, old spellings of transformers, pruned tokens.

    model_args, data_args, training_args = parse_arguments(["--model_name_or_path", "vicuna-7b", ...])

Arguments are checked here, before anything is loaded. All of transformers' `TrainingArguments` can be given.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from llava.model.checkpoint.entries import CONFIG, check_entries

BITS = (4, 8, 16)
# Arguments that a resumed run may change
_WITHOUT_EFFECT = (
    "lazy_preprocess is_multimodal vision_cache vision_cache_gb attn_implementation bad_samples"
).split()
# Arguments that become entries of config.json, and are checked as such
_CONFIG_ENTRIES = (
    "mm_vision_select_layer mm_vision_select_feature mm_projector_type mm_patch_merge_type "
    "mm_use_im_start_end mm_use_im_patch_token"
).split()
# Spellings of LLaVA's scripts and of older releases of transformers, and today's.
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "logging_dir": None,
    "overwrite_output_dir": None,
    "save_safetensors": None,
    "jit_mode_eval": None,
    "use_mps_device": None,
}


@dataclass
class ModelArguments:
    """Which model is trained, and how images enter it."""

    model_name_or_path: str = field(
        default="facebook/opt-125m",
        metadata={"help": "language model, or a LLaVA checkpoint to continue from"},
    )
    version: str = field(default="v0", metadata={"help": "conversation template, e.g. plain or v1"})
    freeze_backbone: bool = field(
        default=False, metadata={"help": "train only projector and output layer (default: False)"}
    )
    tune_mm_mlp_adapter: bool = field(
        default=False, metadata={"help": "stage 1: train only the projector (default: False)"}
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "folder or Hub name of the vision tower"}
    )
    mm_vision_select_layer: int = field(default=-1, metadata={"help": "layer of the tower, -2 in LLaVA-1.5"})
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "mm_projector.bin of stage 1"}
    )
    mm_projector_type: str = field(default="linear", metadata={"help": "linear, mlp2x_gelu, ..."})
    mm_use_im_start_end: bool = field(
        default=False, metadata={"help": "put <im_start>, <im_end> around images"}
    )
    mm_use_im_patch_token: bool = field(default=True, metadata={"help": "add the token <im_patch>"})
    mm_patch_merge_type: str = field(default="flat", metadata={"help": "flat or spatial_unpad"})
    mm_vision_select_feature: str = field(default="patch", metadata={"help": "only patch is supported"})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "kernels of the language model: sdpa, eager or flash_attention_2 (default: sdpa)"},
    )
    method: str = field(default="vispruner", metadata={"help": "pruning method (default: vispruner)"})
    visual_token_num: str = field(
        default="none",
        metadata={"help": "visual tokens to keep per crop; N,N,... draws one per batch (default: none)"},
    )
    important_ratio: float = field(
        default=0.5, metadata={"help": "share of kept tokens selected by attention (default: 0.5)"}
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str | None = field(default=None, metadata={"help": "LLaVA's JSON, or one sample per line"})
    lazy_preprocess: bool = field(
        default=False, metadata={"help": "no effect: samples are always read lazily"}
    )
    is_multimodal: bool = field(default=False, metadata={"help": "set by --vision_tower"})
    image_folder: str | None = field(default=None, metadata={"help": "folder of the images in the JSON file"})
    image_aspect_ratio: str = field(default="square", metadata={"help": "square, pad or anyres"})
    image_grid_pinpoints: str | None = field(
        default=None, metadata={"help": "resolutions of anyres, as in config.json (default: LLaVA-1.6's)"}
    )
    bad_samples: str = field(
        default="stop",
        metadata={"help": "stop or skip: what a sample that cannot be used does (default: stop)"},
    )
    vision_cache: str | None = field(
        default=None, metadata={"help": "folder for encoded images, so that later epochs skip the tower"}
    )
    vision_cache_gb: float = field(default=50.0, metadata={"help": "its largest size in GB (default: 50)"})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained: transformers' arguments and LLaVA's."""

    cache_dir: str | None = field(default=None, metadata={"help": "folder of downloads from the Hub"})
    optim: str = field(default="adamw_torch", metadata={"help": "optimizer of transformers"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False"})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "do not train the projector"})
    model_max_length: int = field(
        default=512,
        metadata={"help": "longest sequence in tokens, visual ones included; longer ones are cut"},
    )
    double_quant: bool = field(default=True, metadata={"help": "QLoRA: quantize the quantization constants"})
    quant_type: str = field(default="nf4", metadata={"help": "QLoRA: fp4 or nf4"})
    bits: int = field(default=16, metadata={"help": "4 or 8: QLoRA (default: 16)"})
    lora_enable: bool = field(default=False, metadata={"help": "train LoRA adapters (default: False)"})
    lora_r: int = field(default=64, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "their scale is alpha / rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapters"})
    lora_weight_path: str = field(default="", metadata={"help": "LoRA folder to continue from"})
    lora_bias: str = field(default="none", metadata={"help": "only none is supported"})
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the projector (default: --learning_rate)"}
    )
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "batches of one modality and similar length"}
    )

    # What is trained and saved: "projector", "lora" or "full". Follows from the others, by `check_arguments`.
    part: str = field(init=False, default="full")


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check a command line.

    Raises:
        ValueError: an unknown or invalid argument; the message names it.
    """
    argv = _modern(sys.argv[1:] if argv is None else argv)
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    parser.prog = "llava/train/train.py"
    parser.description = "Train a LLaVA, with all or with pruned visual tokens."
    parser.exit_on_error = True
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    check_arguments(model_args, data_args, training_args)
    return model_args, data_args, training_args


def _modern(argv: Sequence[str]) -> list[str]:
    """Translate old spellings; drop what this machine cannot do and what has no effect any more."""
    words: list[str] = []
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            words.append(word)
    given = dict(options)  # the last of several counts
    cpu = not torch.cuda.is_available()
    for name, values in given.items():
        if name == "warmup_ratio":
            if "warmup_steps" in given and float(given["warmup_steps"][0]) > 0:
                continue  # steps win, as in transformers
            name = "warmup_steps"
        elif name == "warmup_steps" and "warmup_ratio" in given and float((values or ["0"])[0]) == 0:
            continue
        elif name == "group_by_length":
            if (values or ["True"])[0].lower() not in ("true", "1", "yes"):
                continue
            name, values = "train_sampling_strategy", ["group_by_length"]
        elif name == "tf32" and cpu:
            continue
        elif name == "fsdp" and not any(values):
            continue
        elif _RENAMED.get(name, name) is None:
            print(f"note: --{name} has no effect any more and is ignored", file=sys.stderr)
            continue
        else:
            name = _RENAMED.get(name, name)
        words += [f"--{name}", *values]
    if cpu and not any(word == "--use_cpu" for word in words):
        words += ["--use_cpu", "True"]
    if not any(word == "--report_to" for word in words):
        words += ["--report_to", "tensorboard" if find_spec("tensorboard") else "none"]
    return words


def check_arguments(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Check arguments against each other and against the files they name.

    Raises:
        ValueError: an invalid value or combination.
        FileNotFoundError: a file that is named does not exist.
    """
    if not data.data_path:
        raise ValueError("--data_path: not set. Set it to LLaVA's JSON of conversations.")
    for name, path in (
        ("data_path", data.data_path),
        ("pretrain_mm_mlp_adapter", model.pretrain_mm_mlp_adapter),
    ):
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"--{name} {path}: no such file.")
    if data.image_folder and not Path(data.image_folder).is_dir():
        raise FileNotFoundError(f"--image_folder {data.image_folder}: no such folder.")
    if data.bad_samples not in ("stop", "skip"):
        raise ValueError(f"--bad_samples: {data.bad_samples!r} is unknown. Choose stop or skip.")
    if not 0 < data.vision_cache_gb < 1e9:
        raise ValueError(f"--vision_cache_gb: {data.vision_cache_gb} is not a size. Set a positive number.")
    if data.vision_cache and not model.vision_tower:
        raise ValueError("--vision_cache: needs --vision_tower.")
    if data.vision_cache and Path(data.vision_cache).exists() and not Path(data.vision_cache).is_dir():
        raise ValueError(f"--vision_cache {data.vision_cache}: is a file. Name a folder, which may be new.")
    if data.image_aspect_ratio not in ("square", "pad", "anyres"):
        raise ValueError(
            f"--image_aspect_ratio: {data.image_aspect_ratio!r} is unknown. Choose square, pad or anyres."
        )
    given = {name: getattr(model, name) for name in _CONFIG_ENTRIES}
    check_entries(given, {name: CONFIG[name] for name in given}, "arguments")
    if training.bits not in BITS:
        raise ValueError(f"--bits: {training.bits} is not supported. Choose 4, 8 or 16.")
    if training.bits != 16 and not training.lora_enable:
        raise ValueError("--bits: quantized weights cannot be trained. Add --lora_enable True.")
    if training.bits != 16 and not find_spec("bitsandbytes"):
        raise ValueError("--bits: bitsandbytes is not installed. Run: pip install bitsandbytes")
    if training.lora_bias != "none":
        raise ValueError(
            f"--lora_bias: {training.lora_bias!r} is not supported: these language models have no biases. "
            "Leave it out."
        )
    if training.lora_enable and not find_spec("peft"):
        raise ValueError("--lora_enable: peft is not installed. Run: pip install 'vispruner[train]'")
    if training.lora_weight_path and not training.lora_enable:
        raise ValueError("--lora_weight_path: needs --lora_enable True.")
    if training.lora_enable and (model.tune_mm_mlp_adapter or model.freeze_backbone):
        raise ValueError("--lora_enable: cannot be combined with --tune_mm_mlp_adapter or --freeze_backbone.")
    if model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter:
        raise ValueError(
            "--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter are both set: nothing would be trained. "
            "Leave one out."
        )
    if model.tune_mm_mlp_adapter and not model.vision_tower:
        raise ValueError("--tune_mm_mlp_adapter: needs --vision_tower.")
    if training.remove_unused_columns:
        raise ValueError("--remove_unused_columns: must be False, or images are dropped.")
    if model.tune_mm_mlp_adapter and model.mm_use_im_start_end:
        raise ValueError(
            "--mm_use_im_start_end: new embeddings are not trained with --tune_mm_mlp_adapter. Leave it out, "
            "as LLaVA-1.5 does."
        )
    if training.deepspeed:
        _check_deepspeed(training.deepspeed)
    training.part = "projector" if model.tune_mm_mlp_adapter else "lora" if training.lora_enable else "full"
    if training.gradient_checkpointing_kwargs is None:
        training.gradient_checkpointing_kwargs = {"use_reentrant": False}
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False  # every trained weight has a gradient in every step


def _check_deepspeed(config: str | dict) -> None:
    """Raise for a missing DeepSpeed or file; warn of sections that replace our arguments."""
    if not find_spec("deepspeed"):
        raise ValueError("--deepspeed: not installed. Run: pip install 'vispruner[deepspeed]'")
    if isinstance(config, str):
        try:
            entries = json.loads(Path(config).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config}: is not valid JSON ({error}).") from error
    else:
        entries = config
    found = [name for name in ("optimizer", "scheduler") if name in entries]
    if found:
        print(
            f"warning: {config}: the sections {' and '.join(found)} replace --learning_rate, "
            "--lr_scheduler_type, --mm_projector_lr and the groups of parameters. Remove them, as in "
            "scripts/zero2.json.",
            file=sys.stderr,
        )


def describe(arguments: Arguments) -> dict[str, object]:
    """Return the arguments that decide the curve of a run, for the check when it is resumed."""
    model, data, training = arguments
    kept = {**dataclasses.asdict(model), **dataclasses.asdict(data)}
    for name in _WITHOUT_EFFECT:
        kept.pop(name)
    names = (
        "seed data_seed num_train_epochs max_steps learning_rate mm_projector_lr weight_decay warmup_steps "
        "lr_scheduler_type per_device_train_batch_size gradient_accumulation_steps world_size "
        "model_max_length lora_enable lora_r lora_alpha lora_dropout bits bf16 fp16 group_by_modality_length "
        "freeze_mm_mlp_adapter optim max_grad_norm adam_beta1 adam_beta2 adam_epsilon"
    )
    for name in names.split():
        value = getattr(training, name)
        kept[name] = value if isinstance(value, (int, float, str, type(None))) else str(value)
    return {name: getattr(value, "value", value) for name, value in kept.items()}

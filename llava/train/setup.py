"""The model that is trained: language model, projector and LoRA; the frozen tower is kept outside of it.

The tower is not part of the module tree while training: DeepSpeed neither partitions nor casts it, it is not
saved, and no LoRA is put into it. Every process loads a whole copy of the language model.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.config import stored_config
from llava.model.checkpoint.find import TRAINABLES, resolve_checkpoint
from llava.model.checkpoint.keys import translate
from llava.model.checkpoint.read import read_file
from llava.model.language_model import classes_of, model_type_of
from llava.train.arguments import Arguments, ModelArguments, TrainingArguments
from llava.train.preprocess import conversation_name, training_tokenizer

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# LLaVA-1.6's resolutions, for --image_aspect_ratio anyres
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def load_base(model_args: ModelArguments, training_args: TrainingArguments) -> tuple[Any, Any, Path]:
    """Load the language model, or the LLaVA checkpoint, to train; return (model, tokenizer, its folder).

    The model is float32, or bfloat16 / float16 where DeepSpeed has master weights of its own. Weights that
    are not trained are narrowed later (`narrow_frozen`).

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained_model`; the architecture is not Llama or Mistral.
    """
    path = model_args.model_name_or_path
    folder = resolve_checkpoint(path)
    stored = stored_config(folder)
    kind = model_type_of(stored) or {"llama": "llava_llama", "mistral": "llava_mistral"}.get(
        stored.get("model_type")
    )
    if kind is None:
        raise CheckpointError(
            f"--model_name_or_path {path}: model_type is {stored.get('model_type')!r}. Pass a Llama, "
            "a Mistral, or a LLaVA checkpoint of one."
        )
    options: dict[str, Any] = {"dtype": working_dtype(training_args)}
    if training_args.bits != 16:
        options[f"load_in_{training_args.bits}bit"] = True
    tokenizer = training_tokenizer(folder, training_args.model_max_length)  # refuse before reading weights
    model = classes_of(kind)[1].from_pretrained(folder, **options)
    return model, tokenizer, folder


def working_dtype(training_args: TrainingArguments) -> torch.dtype:
    """Return the dtype of trained weights: float32 under autocast, half precision under DeepSpeed."""
    if not training_args.deepspeed:
        return torch.float32
    return half_dtype(training_args) or torch.float32


def half_dtype(training_args: TrainingArguments) -> torch.dtype | None:
    """Return the dtype of --bf16 or --fp16, None in float32."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None


def build_model(arguments: Arguments) -> tuple[Any, Any, Path]:
    """Build what the arguments describe; return (model, tokenizer, folder of the base).

    `model` is a LLaVA model, or a peft model around one with --lora_enable. Set the seed before.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, tower or projector is missing or does not fit.
    """
    model_args, data_args, training_args = arguments
    model, tokenizer, folder = load_base(model_args, training_args)
    model.requires_grad_(not (model_args.freeze_backbone or training_args.lora_enable))
    if model_args.freeze_backbone:
        model.lm_head.requires_grad_(True)
    wrapped = add_lora(model, model_args, training_args) if training_args.lora_enable else model
    if model_args.vision_tower:
        _add_vision(model, tokenizer, arguments)
    elif model.get_model().towers():
        raise ValueError(
            "--vision_tower: not set, but the checkpoint has one. Name it, or train a bare language model."
        )
    config = model.config
    config.tokenizer_padding_side = "right"
    config.tokenizer_model_max_length = training_args.model_max_length
    name = conversation_name(model_args.version)
    if name != "plain":
        config.conv_mode = name
    if training_args.lora_weight_path:
        load_lora(wrapped, Path(training_args.lora_weight_path))
    narrow_frozen(model, training_args)
    return wrapped, tokenizer, folder


def _add_vision(model: Any, tokenizer: Any, arguments: Arguments) -> None:
    model_args, data_args, training_args = arguments
    model.get_model().initialize_vision_modules(model_args)
    config, projector = model.config, model.get_model().mm_projector
    config.image_aspect_ratio = data_args.image_aspect_ratio
    if data_args.image_aspect_ratio == "anyres" and not getattr(config, "image_grid_pinpoints", None):
        config.image_grid_pinpoints = data_args.image_grid_pinpoints or PINPOINTS
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = training_args.freeze_mm_mlp_adapter
    config.mm_use_im_start_end = model_args.mm_use_im_start_end
    config.mm_use_im_patch_token = model_args.mm_use_im_patch_token
    config.mm_projector_lr = training_args.mm_projector_lr
    if model_args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
    projector.requires_grad_(not training_args.freeze_mm_mlp_adapter)
    if hasattr(model.get_model(), "image_newline"):
        model.get_model().image_newline.requires_grad_(not training_args.freeze_mm_mlp_adapter)
    before = tokenizer.get_vocab()
    model.initialize_vision_tokenizer(model_args, tokenizer)
    added = {token: index for token, index in tokenizer.get_vocab().items() if token not in before}
    tokenizer.tokens_added_by_training = added
    if model_args.tune_mm_mlp_adapter:
        model.get_input_embeddings().requires_grad_(False)
    tower = detach_tower(model)
    tower.requires_grad_(False)
    tower.eval()
    tower.to(device=training_args.device, dtype=half_dtype(training_args) or torch.float32)
    data_args.is_multimodal = True


def detach_tower(model: Any) -> nn.Module:
    """Take the tower out of the module tree; `get_vision_tower` still returns it."""
    holder = model.get_model()
    tower = holder.vision_tower
    del holder.vision_tower
    object.__setattr__(holder, "vision_tower", tower)
    return tower


def narrow_frozen(model: Any, training_args: TrainingArguments) -> None:
    """Keep weights that are not trained in half precision, where --bf16 or --fp16 is set."""
    half = half_dtype(training_args)
    if half is None or training_args.deepspeed:
        return  # DeepSpeed casts them itself
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(half)


# --- LoRA -----------------------------------------------------------------------------------------------
def decoder_linears(model: Any) -> list[str]:
    """Return the last names of the linear layers in the decoder, such as q_proj."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.get_model().layers.named_modules()
        if isinstance(module, nn.Linear) or "Linear" in type(module).__name__  # quantized ones, too
    }
    return sorted(names)


def add_lora(model: Any, model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    """Wrap a model for LoRA on the linear layers of its decoder, float32 unless DeepSpeed casts it."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if training_args.bits != 16:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=training_args.gradient_checkpointing
        )
    settings = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        target_modules=decoder_linears(model),
        lora_dropout=training_args.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, settings)
    settings.base_model_name_or_path = name_from_elsewhere(model_args.model_name_or_path)
    return wrapped


def name_from_elsewhere(name: str) -> str:
    """Return a name of a base or tower that is found from elsewhere: an absolute path, or one on the Hub."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_lora(model: Any, folder: Path) -> None:
    """Load the adapter and the projector of a LoRA folder into a wrapped model.

    Raises:
        FileNotFoundError: the folder has no adapter.
        CheckpointError: names or shapes differ from those of the model.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Pass a folder that --lora_enable wrote.")
    own = {name.replace(".default", ""): p for name, p in model.named_parameters() if ".lora_" in name}
    _copy(dict(read_file(path)), own, path)
    if (folder / TRAINABLES).is_file():
        load_projector(model, folder / TRAINABLES)


def load_projector(model: Any, path: Path) -> None:
    """Load projector weights that training wrote, whatever the model is wrapped in."""
    own = {translate(name): p for name, p in model.named_parameters() if is_projector(name)}
    _copy({translate(key): tensor for key, tensor in read_file(path)}, own, path)


def is_projector(name: str) -> bool:
    """Tell whether a parameter belongs to the projector (image_newline included)."""
    return "mm_projector" in name or "image_newline" in name


def _copy(found: dict[str, torch.Tensor], own: dict[str, nn.Parameter], path: Path) -> None:
    """Copy tensors into parameters, gathering those that ZeRO-3 has partitioned."""
    wrong = sorted(found.keys() ^ own.keys())
    wrong += [n for n in found.keys() & own.keys() if found[n].shape != full_shape(own[n])]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} weights do not fit (first: {wrong[0]}). Use a folder of the same base, "
            "--lora_r and --mm_projector_type."
        )
    with torch.no_grad(), gathered(list(own.values()), modify=True):
        for name, parameter in own.items():
            parameter.copy_(found[name])


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter that may be partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: list[nn.Parameter], modify: bool = False) -> Any:
    """Return a context in which parameters that ZeRO-3 has partitioned are whole, on every process."""
    if not any(hasattr(one, "ds_id") for one in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)

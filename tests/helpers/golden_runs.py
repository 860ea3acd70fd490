"""The runs of runs.json: `llava.train` with the arguments of each, compared with what LLaVA wrote.

Called by `helpers.golden_training`. Each run gets the recorded samples in the recorded order: that of our own
sampler differs on purpose (`DEVIATIONS` there), so only its grouping is compared.

Losses, by run and step:

| run starts from | step | compared |
|-|-|-|
| a LLaVA checkpoint | all | within LOSS_TOLERANCE |
| a language model | batches without an image | within LOSS_TOLERANCE |
| a language model | batches with an image | within UNKNOWN_START |

The projector at the start of the last kind is not recorded. Its first two losses, of unchanged weights, match
neither the projectors of the checkpoints nor those of the seeds that were tried.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from helpers.golden_analysis import find_checkpoint
from helpers.golden_model import DATA
from helpers.golden_video import expect_close, expect_equal
from helpers.recipe_images import make_image
from llava.model.checkpoint.read import read_file
from llava.model.language_model import model_type_of
from llava.train.train import train
from llava.train.trainer import LLaVATrainer

# Files that LLaVA writes and this package does not, and why.
NOT_WRITTEN = {
    "README.md": "peft's empty model card",
    "training_args.bin": "a pickle of the arguments; complete.json has them as text",
}
# Entries of config.json that name the machine, the release of transformers or the class in memory.
NOT_COMPARED = {
    "_name_or_path": "a path of the machine",
    "architectures": "LLaVA keeps the base's class in stages that save no language model",
    "mm_vision_tower": "absolute here, so that a checkpoint loads from elsewhere",
    "torch_dtype": "written as dtype since transformers 5; trained weights are float32 here",
    "transformers_version": "the release",
    "pretraining_tp": "dropped by transformers 5",
    "rope_scaling": "rope_parameters since transformers 5",
    "rope_theta": "rope_parameters since transformers 5",
}
# LLaVA computes in bfloat16 throughout, we with float32 weights under autocast.
LOSS_TOLERANCE = 3e-3  # relative
# Over 16 random projectors, the loss of a batch with images has a standard deviation of up to 5.5 %.
UNKNOWN_START = 0.15  # relative
# An entry of adapter_config.json that both write and that has a meaning
ADAPTER = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "task_type", "use_dora", "use_rslora")


class RecordingTrainer(LLaVATrainer):
    """Remembers groups and parameters as the optimizer gets them, and the order its sampler would give."""

    last: RecordingTrainer
    samples: list[int] = []  # in the order of the official run
    own: list[int] = []  # in the order of the sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> list[int]:
        RecordingTrainer.own = list(super()._get_train_sampler(train_dataset))
        return list(RecordingTrainer.samples)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.groups = [
            {**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups
        ]
        self.parameters = {
            name: (str(p.dtype).removeprefix("torch."), p.requires_grad)
            for name, p in self.model.named_parameters()
        }
        RecordingTrainer.last = self
        return optimizer


def entries(folder: Path) -> Iterator[tuple[str, str, Callable[[Any], None], Any]]:
    """Yield (group, id, check, case) for every aspect of every run."""
    document = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    for name, run in document["runs"].items():
        if name == "notes":
            continue
        again = functools.cache(functools.partial(repeat, folder, run, document["data"]))
        for aspect in ASPECTS:
            identity = f"{name}/{aspect.__name__.removeprefix('check_')}"
            yield "runs", identity, functools.partial(check, aspect, again), run


def check(aspect: Callable[[dict, dict], None], again: Callable[[], dict], run: dict) -> None:
    aspect(again(), run)


def repeat(folder: Path, run: dict, data: dict) -> dict[str, Any]:
    """Train with the arguments of a run; return what was recorded and written."""
    config, steps = run["config.json"], len(run["logs"]) - 1
    with tempfile.TemporaryDirectory() as scratch:
        root, output = Path(scratch), Path(scratch, "output")
        base = find_checkpoint(folder, config["_name_or_path"])
        from_llava = (base / "config.json").is_file()
        if not from_llava:
            base = write_base(folder, config, root / "base")
        samples = write_samples(root, data, "pretrain" if config["tune_mm_mlp_adapter"] else "finetune")
        RecordingTrainer.samples = run["data_order"]
        images = images_of(run, run["data_order"], samples)
        tower = find_checkpoint(folder, config["mm_vision_tower"])
        argv = arguments(run, root, base, tower, output, is_grouped(run, images))
        with mock.patch("llava.train.trainer.LLaVATrainer", RecordingTrainer):
            summary = train(argv)
        trainer = RecordingTrainer.last
        expect_equal(summary["steps"], steps, "steps")
        files: dict[str, Any] = {}
        for path in sorted(output.rglob("*")):
            name = path.relative_to(output).as_posix()
            if path.name in ("mm_projector.bin", "non_lora_trainables.bin") or path.suffix == ".safetensors":
                files[name] = {key: list(tensor.shape) for key, tensor in read_file(path)}
            elif path.is_file():
                files[name] = None
        return {
            "groups": trainer.groups,
            "parameters": trainer.parameters,
            "rates": [one["learning_rate"] for one in trainer.state.log_history if "learning_rate" in one],
            "losses": [one["loss"] for one in trainer.state.log_history if "loss" in one],
            "known": [from_llava or not count for count in images],
            "order": RecordingTrainer.own,
            "grouped": is_grouped(run, images),
            "images": images,
            "own_images": images_of(run, RecordingTrainer.own, samples),
            "files": files,
            "config": json.loads((output / "config.json").read_text(encoding="utf-8")),
            "adapter": json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
            if (output / "adapter_config.json").is_file()
            else None,
        }


def arguments(run: dict, root: Path, base: Path, tower: Path, output: Path, grouped: bool) -> list[str]:
    """Return the command line of a run, as far as its record tells."""
    config, adapter, groups = run["config.json"], run.get("adapter_config.json"), run["param_groups"]
    backbone = [one[1] for name, one in run["parameters"].items() if ".layers." in name]
    saved = [int(name.split("/")[0].split("-")[1]) for name in run["files"] if name.startswith("checkpoint-")]
    given: dict[str, Any] = {
        "model_name_or_path": base,
        "version": "plain" if config["tune_mm_mlp_adapter"] else "v1",
        "data_path": root / "data.json",
        "image_folder": root,
        "vision_tower": tower,
        "output_dir": output,
        "tune_mm_mlp_adapter": config["tune_mm_mlp_adapter"],
        "freeze_mm_mlp_adapter": config["freeze_mm_mlp_adapter"],
        "freeze_backbone": not any(backbone) and adapter is None and not config["tune_mm_mlp_adapter"],
        "bf16": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size(run),
        "learning_rate": groups[0]["lr"],
        "weight_decay": groups[0]["weight_decay"],
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": min(saved, default=len(run["logs"])),
        "model_max_length": config["tokenizer_model_max_length"],
        "group_by_modality_length": grouped,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "disable_tqdm": True,
    }
    for name in (
        "mm_vision_select_layer mm_vision_select_feature mm_projector_type mm_patch_merge_type "
        "mm_use_im_start_end mm_use_im_patch_token image_aspect_ratio mm_projector_lr"
    ).split():
        if config[name] is not None:
            given[name] = config[name]
    if adapter is not None:
        given |= {"lora_enable": True, "lora_r": adapter["r"], "lora_alpha": adapter["lora_alpha"]}
        given["lora_dropout"] = adapter["lora_dropout"]
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def write_base(folder: Path, config: dict, base: Path) -> Path:
    """Write the language model of the checkpoint that has the run's shapes, without LLaVA's parts."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "mm_vision_tower", "model_type")
    places = [path for place in (folder, folder.parent / "model", DATA) for path in sorted(place.glob("*/"))]
    for path in places:
        if not (path / "config.json").is_file():
            continue
        entries = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if model_type_of(entries) and all(entries.get(name) == config[name] for name in names):
            break
    else:
        raise SystemExit(f"{folder}: no checkpoint has the shapes of {config['_name_or_path']}.")
    base.mkdir()
    for file in path.iterdir():
        if file.suffix not in (".bin", ".safetensors") and not file.name.endswith(".index.json"):
            (base / file.name).write_bytes(file.read_bytes())
    plain = {k: v for k, v in entries.items() if "mm_" not in k and not k.startswith("image_")}
    plain |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    weights = {}
    for file in sorted(path.glob("pytorch_model*.bin")) + sorted(path.glob("*.safetensors")):
        weights |= {k: v for k, v in read_file(file) if "mm_" not in k and "vision_tower" not in k}
    torch.save(weights, base / "pytorch_model.bin")
    return base


def write_samples(root: Path, data: dict, stage: str) -> list[dict]:
    """Write the recorded samples of a stage and their images; return the samples."""
    for name, image in data["images"].items():
        pixels = make_image(image["width"], image["height"], image["seed"])
        Image.fromarray(pixels).save(root / name)
    (root / "data.json").write_text(json.dumps(data[stage]), encoding="utf-8")
    return data[stage]


def batch_size(run: dict) -> int:
    return len(run["data_order"]) // (len(run["logs"]) - 1)


def images_of(run: dict, order: list[int], samples: list[dict]) -> list[int]:
    """Return how many samples with an image each batch has."""
    size = batch_size(run)
    has = ["image" in samples[index] for index in order]
    return [sum(has[start : start + size]) for start in range(0, len(has), size)]


def is_grouped(run: dict, images: list[int]) -> bool:
    """Tell whether a run grouped by modality: all batches but the last have one, and there are both."""
    return {0, batch_size(run)} == set(images[:-1])


def check_groups(found: dict, run: dict) -> None:
    """Compare the optimizer's groups; the rate is the one before the schedule."""
    groups = [group for group in found["groups"] if group["params"]]
    wanted = [group for group in run["param_groups"] if group["params"]]
    expect_equal(len(groups), len(wanted), "groups")
    for number, (group, one) in enumerate(zip(groups, wanted, strict=True)):
        expect_equal(sorted(group["params"]), sorted(one["params"]), f"group {number}")
        for name in ("weight_decay", "eps"):
            expect_equal(group[name], one[name], f"{name} of group {number}")
        expect_equal(group.get("initial_lr", group["lr"]), one["lr"], f"rate of group {number}")
        expect_equal(list(group["betas"]), one["betas"], f"betas of group {number}")


def check_parameters(found: dict, run: dict) -> None:
    """Compare names and which are trained; trained weights are float32 here, the others in half precision."""
    expect_equal(sorted(found["parameters"]), sorted(run["parameters"]), "names")
    for name, (_, trained) in run["parameters"].items():
        wanted = ("float32" if trained else "bfloat16", trained)
        expect_equal(found["parameters"][name], wanted, name)


def check_files(found: dict, run: dict) -> None:
    """Compare names of files, keys and shapes; weights of the tower are not saved here."""
    wanted = {name: keys for name, keys in run["files"].items() if Path(name).name not in NOT_WRITTEN}
    expect_equal(sorted(wanted.keys() - found["files"].keys()), [], "missing files")
    for name, keys in wanted.items():
        if keys is not None:
            shapes = {key: one[0] for key, one in keys.items() if not key.startswith("(")}
            expect_equal(found["files"][name], dict(sorted(shapes.items())), name)


def check_config(found: dict, run: dict) -> None:
    config = {name: value for name, value in run["config.json"].items() if name not in NOT_COMPARED}
    missing = {name: value for name, value in config.items() if name not in found["config"]}
    expect_equal(missing, {}, "missing entries")
    for name, value in config.items():
        expect_equal(found["config"][name], value, f"config.json: {name}")
    if adapter := run.get("adapter_config.json"):
        for name in ADAPTER:
            expect_equal(found["adapter"][name], adapter[name], f"adapter_config.json: {name}")
        modules = [sorted(one["target_modules"]) for one in (found["adapter"], adapter)]
        expect_equal(modules[0], modules[1], "adapter_config.json: target_modules")


def check_rates(found: dict, run: dict) -> None:
    """Compare the schedule: transformers 4 logged the rate of the next step, 5 that of the step itself."""
    wanted = [one["learning_rate"] for one in run["logs"] if "learning_rate" in one]
    expect_equal(len(found["rates"]), len(wanted), "steps")
    expect_close(found["rates"][1:], wanted[:-1], 1e-12, "learning rates", 1e-6)


def check_batches(found: dict, run: dict) -> None:
    """Compare size and modality of the batches; their order, and samples within a modality, are random."""
    expect_equal(sorted(found["order"]), sorted(run["data_order"]), "samples")
    expect_equal(len(found["own_images"]), len(found["images"]), "steps")
    if found["grouped"]:
        expect_equal(sorted(found["own_images"][:-1]), sorted(found["images"][:-1]), "images per batch")
        expect_equal(found["own_images"][-1], found["images"][-1], "images of the last batch")


def check_losses(found: dict, run: dict) -> None:
    """Compare the loss of every step, loosely where the projector at its start is unknown."""
    wanted = [one["loss"] for one in run["logs"] if "loss" in one]
    expect_equal(len(found["losses"]), len(wanted), "steps")
    for step, (loss, known) in enumerate(zip(found["losses"], found["known"], strict=True)):
        relative = LOSS_TOLERANCE if known else UNKNOWN_START
        expect_close([loss], [wanted[step]], 0, f"loss of step {step}", relative)


ASPECTS = (
    check_groups,
    check_parameters,
    check_files,
    check_config,
    check_rates,
    check_batches,
    check_losses,
)

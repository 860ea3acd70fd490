"""A checkpoint's vision tower: where it comes from, how its files' keys are named, its own weights.

Building the tower and filling it are two steps, because a checkpoint that contains tower weights overrides
the tower's own folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.model.checkpoint import CheckpointError, warn
from llava.model.checkpoint.entries import (
    OBJECT,
    PROCESSOR,
    TOWER,
    check_entries,
    check_processor,
    read_entries,
    read_object,
    require_entries,
)
from llava.model.checkpoint.find import has_weights, last_part, resolve_tower, tower_names
from llava.model.checkpoint.keys import TOWER as MARK
from llava.model.checkpoint.keys import VIDEO_TOWER, translate

if TYPE_CHECKING:
    from torch import Tensor

    from llava.model.multimodal_encoder.base import VisionTower

# Towers that LLaVA checkpoints name: a checkpoint that contains their weights loads without the Hub.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu",
    },
    "openai/clip-vit-large-patch14": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu",
    },
}  # fmt: skip


IMAGE_KIND, VIDEO_KIND = "LanguageBindImage", "LanguageBindVideo"  # model_type of Video-LLaVA's towers


@dataclass(frozen=True)
class TowerSource:
    """What a tower is made from: its configuration, the folder of its weights, its image processor."""

    config: dict
    folder: Path | None  # None: the weights must be inside the checkpoint
    processor: dict  # entries of preprocessor_config.json; {} for LanguageBind's, which has none
    why_no_folder: str = ""
    folder_first: bool = False  # the folder's weights are used although the checkpoint has some, too

    @property
    def side(self) -> int | None:
        """Side of a crop in pixels."""
        crop = self.processor.get("crop_size")
        side = crop.get("height") if isinstance(crop, dict) else crop
        return side or (self.config.get("vision_config") or self.config).get("image_size")


def find_towers(config: dict, checkpoint: Path, base: Path | None = None) -> dict[str, TowerSource]:
    """Find the towers of a checkpoint: attribute of the decoder -> source; {} if config.json names none.

    Raises:
        FileNotFoundError, CheckpointError: as `find_tower`.
    """
    return {
        holder: find_tower(name, checkpoint, base, entry)
        for holder, (entry, name) in tower_names(config).items()
    }


def find_tower(
    name: str | list[str], checkpoint: Path | None, base: Path | None = None, entry: str = "mm_vision_tower"
) -> TowerSource:
    """Find the tower that config.json names, given as a text or a list of one.

    Args:
        name: the value of `entry` in config.json.
        checkpoint, base: the folders in and beside which the tower may be.

    Raises:
        FileNotFoundError: it is nowhere; the message lists where it was looked for.
        CheckpointError: several towers, or a tower whose config.json is malformed.
    """
    if isinstance(name, list):
        if len(name) != 1:
            raise CheckpointError(
                f"{checkpoint}/config.json: mm_vision_tower lists {len(name)} towers, but one is supported. "
                "Set it to the tower that the checkpoint was trained with."
            )
        name = name[0]
    try:
        folder = resolve_tower(name, checkpoint, base, entry)
    except FileNotFoundError as error:
        known = {last_part(one): config for one, config in KNOWN_TOWERS.items()}
        if (config := known.get(last_part(name))) is not None and entry != "mm_video_tower":
            return TowerSource(config, None, clip_processor(config["image_size"]), str(error))
        raise
    config = read_entries(folder / "config.json", TOWER)
    where = str(folder / "config.json")
    vision = config.get("vision_config") or config
    kind = config.get("model_type")
    if (kind == VIDEO_KIND) != (entry == "mm_video_tower"):
        wanted, why = "a CLIP or LanguageBindImage", "It would be used without its temporal attention"
        if entry == "mm_video_tower":
            wanted, why = VIDEO_KIND, "Another tower does not attend over the frames of a clip"
        raise CheckpointError(
            f"{where}: model_type is {kind!r}, but the tower of {entry} must be {wanted}. {why}. Set {entry} "
            "to the tower that the checkpoint was trained with."
        )
    if kind in (IMAGE_KIND, VIDEO_KIND):
        check_entries(vision, TOWER, f"{where}: vision_config")
        needed = (
            "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size image_size "
            "hidden_act"
        ) + (" add_time_attn num_frames" if kind == VIDEO_KIND else "")
        require_entries(vision, needed, f"{where}: vision_config")
        check_tower(vision, where)
        return TowerSource(config, folder, {}, folder_first=entry != "mm_vision_tower")
    if vision is config:
        require_entries(
            config, "hidden_size num_hidden_layers num_attention_heads patch_size image_size", where
        )
    else:
        check_entries(vision, TOWER, f"{where}: vision_config")
    check_tower(vision, where)
    processor = read_processor(folder) or clip_processor(vision.get("image_size", 224))
    return TowerSource(config, folder, processor, folder_first=entry != "mm_vision_tower")


def check_tower(vision: dict, where: str) -> None:
    """Check that a tower's entries fit each other. Raises `CheckpointError`."""
    width, heads = vision.get("hidden_size"), vision.get("num_attention_heads")
    if width is not None and heads is not None and width % heads:
        raise CheckpointError(
            f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}. Use the file of "
            "the original checkpoint."
        )
    side, patch = vision.get("image_size"), vision.get("patch_size")
    if side is not None and patch is not None and patch > side:
        raise CheckpointError(
            f"{where}: patch_size {patch} is larger than image_size {side}. Use the file of the original "
            "checkpoint."
        )


def read_processor(folder: Path) -> dict | None:
    """Read the image processor's settings of a folder; None if it has no file with them.

    Newer releases of transformers save them inside processor_config.json. As there, this file wins over
    preprocessor_config.json; a warning says if they differ.

    Raises:
        CheckpointError: a file is malformed, or an entry has a wrong type.
    """
    flat = nested = None
    if (path := folder / "preprocessor_config.json").exists():
        flat = read_object(path)
        check_processor(flat, str(path))
    if (path := folder / "processor_config.json").exists():
        nested = read_entries(path, {"image_processor": OBJECT}).get("image_processor")
    if nested is None:
        return flat
    check_processor(nested, f"{path}: image_processor")
    differing = [
        key for key in PROCESSOR if flat is not None and key in nested and flat.get(key) != nested[key]
    ]
    if differing:
        warn(
            f"{path}: {', '.join(differing)} differ from preprocessor_config.json. processor_config.json is "
            "used, as in transformers. Remove the file that is not this checkpoint's."
        )
    return nested


def clip_processor(side: int) -> dict:
    """Return the preprocessor_config.json of OpenAI's CLIP for square crops of `side` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


class TowerKeys:
    """Translates the keys of a tower's weight file to the parameter names of the tower that was built."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower
        # Releases of transformers name the modules differently, and so do files: compare canonical names.
        self.table = {tower.canonical(n): n for n, _ in tower.vision_tower.named_parameters()}

    def translate(self, key: str) -> str | None:
        """Return the name below `vision_tower.`, or None for a key that this tower does not use.

        Unused keys are layers after the select layer, final norms, buffers and CLIP's text encoder. An
        unknown key is returned unchanged, for the caller to report.
        """
        name = self.tower.canonical(key)
        if name is None:
            return None
        layer = self.tower.layer_of(name)
        if layer is not None and len(self.tower.layers()) <= layer < self.tower.config.num_hidden_layers:
            return None
        return self.table.get(name, key)


def tower_weights(
    source: TowerSource, checkpoint: Callable[[], Iterable[tuple[str, Tensor, Path]]] | None = None
) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield (key below `vision_tower.`, tensor, file) of a tower's weights, where `fill_model` finds them.

    Args:
        source: its own folder, used if the checkpoint contains no tower, or before it (`folder_first`).
        checkpoint: reads the checkpoint's weights.
    """
    from llava.model.checkpoint.read import read_folder

    inside = has_own_weights(source)
    mark = VIDEO_TOWER if source.config.get("model_type") == VIDEO_KIND else MARK
    for key, tensor, path in checkpoint() if checkpoint is not None and not inside else ():
        name = translate(key)
        if name is not None and name.startswith(mark):
            inside = True
            yield name.removeprefix(mark), tensor, path
    if source.folder is not None and (not inside or has_own_weights(source)):
        yield from read_folder(source.folder)


def has_own_weights(source: TowerSource) -> bool:
    """Return whether the weights of the tower's folder are used before those of the checkpoint."""
    return source.folder_first and source.folder is not None and has_weights(source.folder)


def fill_tower(tower: VisionTower, source: TowerSource, assign: Callable[[str, Tensor, str], None]) -> None:
    """Read the tower folder's weights: call `assign(name below vision_tower, tensor, origin)` for each."""
    from llava.model.checkpoint.read import read_folder

    if source.folder is None:
        raise CheckpointError(
            f"the checkpoint contains no vision tower weights, and the tower was not found: "
            f"{source.why_no_folder}"
        )
    keys = TowerKeys(tower)
    found, whole = set(), False  # layers, unused ones included; whether the norm behind the last one is there
    for key, tensor, path in read_folder(source.folder):
        name = keys.translate(key)
        found.add(tower.layer_of(tower.canonical(key) or ""))
        whole |= key.removeprefix("vision_model.").startswith(("post_layernorm.", "layernorm."))
        if name is not None:
            assign(name, tensor, f"{path}: {key}")
    count, last = tower.config.num_hidden_layers, max((one for one in found if one is not None), default=-1)
    # Files that are saved here leave out unused layers, and the norm behind them.
    # Negative select layers would be counted from a wrong end.
    if whole and len(tower.layers()) <= last + 1 < count:
        raise CheckpointError(
            f"{source.folder / 'config.json'}: num_hidden_layers is {count}, but the weights have {last + 1} "
            "layers. Use the files of one checkpoint."
        )

"""Fill a model that was built without memory: every weight is read once, directly to its device and dtype.

Missing and unexpected keys are errors that list them. Allowed to be missing: tower layers after the select
layer, final norms, constants that old releases saved, and a tied output layer. An image_newline that the
merging does not use is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.model.checkpoint import CheckpointError, warn
from llava.model.checkpoint.keys import HOLDERS, translate
from llava.model.checkpoint.lora import LoraAdapter
from llava.model.checkpoint.placement import Placement
from llava.model.checkpoint.quantize import Quantizer
from llava.model.checkpoint.read import EMBEDDINGS, HEAD, Assigner, listing, refuse_quantized
from llava.model.checkpoint.tower import TowerKeys, TowerSource, fill_tower, has_own_weights
from llava.model.transformers_compat import rebuild_rotary

TOWER_PREFIXES = {holder: f"model.{holder}.vision_tower." for holder in HOLDERS.values()}
NEWLINE = "model.image_newline"


def fill_model(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor, Path]],
    sources: dict[str, TowerSource],
    placement: Placement,
    dtype: torch.dtype,
    tower_dtype: torch.dtype,
    quantizer: Quantizer | None,
    folder: Path,
    adapter: LoraAdapter | None = None,
    quantization: dict | None = None,
) -> None:
    """Assign `weights` to `model`, then the tower's own file if they contained no tower.

    Where the tower's own file comes first, it is read before, and what the checkpoint contains is compared.

    What the weights are wins over what config.json claims about them: output layer tied or not, number of
    tokens. A warning says so.

    Args:
        model: built on the meta device with an untied output layer, its towers attached.
        weights: (key, tensor, file) of everything in the checkpoint.
        sources: where the towers' own weights are, by the attribute that holds the tower.
        dtype, tower_dtype: of the language model with the projector, and of the tower.
        quantizer: None for ordinary weights.
        folder: named in errors.
        adapter: merged into the weights, those of the tower's own file included.
        quantization: `quantization_config` of config.json, named if the weights are quantized.

    Raises:
        CheckpointError: keys are missing or unexpected (the message lists them), weights are quantized, or
            embeddings and output layer differ in their number of tokens.
    """

    def where(name: str) -> tuple[torch.dtype, torch.device]:
        is_tower = name.startswith(tuple(TOWER_PREFIXES.values()))
        return (tower_dtype if is_tower else dtype), placement.device_of(name)

    wrap = None if quantizer is None else lambda n, t: quantizer.wrap(n, t, placement.device_of(n))
    assigner = Assigner(model, where, wrap)
    towers = {holder: getattr(model.model, holder) for holder in sources}
    tower_keys = {holder: TowerKeys(tower) for holder, tower in towers.items()}

    def name_of(name: str) -> str | None:
        """Translate a name of `keys.translate` to the model's; None if the model does not use it."""
        for mark, holder in HOLDERS.items():
            if name.startswith(mark) and holder in towers:
                inside = tower_keys[holder].translate(name.removeprefix(mark))
                return None if inside is None else TOWER_PREFIXES[holder] + inside
            if name.startswith(mark) and any(source.folder_first for source in sources.values()):
                return None  # config.json names no such tower
        if name != NEWLINE or NEWLINE in assigner.names:
            return name
        # LLaVA-NeXT saves image_newline whether or not its merging uses it.
        if getattr(model.config, "mm_patch_merge_type", None) is None:
            warn(
                f"{folder / 'config.json'}: mm_patch_merge_type is missing, and the checkpoint has an "
                "image_newline. It is not used, as in LLaVA. Set the entry as it was in training."
            )
        return None

    def fill(name: str, tensor: Tensor, origin: str) -> None:
        assigner.assign(name, tensor if adapter is None else adapter.merge(name, tensor), origin)

    if adapter is not None:
        adapter.rename(name_of)
    comparisons = {}
    for holder, source in sources.items():
        if has_own_weights(source):
            comparison = comparisons[TOWER_PREFIXES[holder]] = _Comparison(source)
            _fill_tower(holder, towers[holder], source, fill, comparison.remember)
    for key, tensor, path in weights:
        refuse_quantized(key, tensor, path, quantization)
        name = translate(key)
        name = None if name is None else name_of(name)
        compare = next((c.compare for prefix, c in comparisons.items() if str(name).startswith(prefix)), None)
        if compare is not None and name in assigner.done:
            compare(model.get_parameter(name), tensor, key)
        elif name is not None:
            fill(name, tensor, f"{path}: {key}")
    for holder, source in sources.items():
        if not any(n.startswith(TOWER_PREFIXES[holder]) for n in assigner.done):
            _fill_tower(holder, towers[holder], source, fill)
    for comparison in comparisons.values():
        comparison.tell(folder)
    if adapter is not None:
        adapter.finish()
    _finish_embeddings(model, assigner, folder)
    for what, keys in (("unexpected", assigner.unexpected), ("missing", assigner.missing())):
        if keys:
            raise CheckpointError(
                f"{folder}: {len(keys)} {what} keys. Weights and config.json "
                f"{_entries(model.config, keys, quantization)}do not match; use one checkpoint's files.\n"
                f"{listing(keys)}"
            )
    if quantization:
        warn(
            f"{folder / 'config.json'}: quantization_config is ignored, because the weights are not "
            "quantized. Remove the entry."
        )
    _finish(model, placement, frozen=set(quantizer.weights) if quantizer else set())


def _fill_tower(
    holder: str,
    tower: nn.Module,
    source: TowerSource,
    fill: Callable[[str, Tensor, str], None],
    see: Callable[[Tensor], None] | None = None,
) -> None:
    def assign(name: str, tensor: Tensor, origin: str) -> None:
        if see is not None:
            see(tensor)
        fill(TOWER_PREFIXES[holder] + name, tensor, origin)

    fill_tower(tower, source, assign)


class _Comparison:
    """Compares a tower's weights in a checkpoint with those of its own folder, which are used."""

    def __init__(self, source: TowerSource) -> None:
        self.source = source
        self.dtypes: set[torch.dtype] = set()  # that values of the folder were rounded to
        self.differing: list[str] = []

    def remember(self, tensor: Tensor) -> None:
        """Note the dtype of a tensor in the folder."""
        self.dtypes.add(tensor.dtype)

    def compare(self, held: Tensor, other: Tensor, key: str) -> None:
        """Note the key of a tensor that differs by more than rounding."""
        if held.shape == other.shape and other.is_floating_point():
            kinds = [torch.finfo(kind) for kind in {held.dtype, other.dtype, *self.dtypes}]
            ours, theirs = held.detach().cpu().double(), other.double()
            near = sum(kind.eps for kind in kinds) * ours.abs() + sum(kind.tiny * kind.eps for kind in kinds)
            if bool(((ours - theirs).abs() <= near).all()):
                return
        self.differing.append(key)

    def tell(self, folder: Path) -> None:
        """Warn if tensors differ."""
        if self.differing:
            warn(
                f"{folder}: {len(self.differing)} weights of a tower (first: {self.differing[0]}) are not "
                f"those of {self.source.folder} by more than rounding. Those of the tower's folder are used, "
                "as in Video-LLaVA. Use tower and checkpoint of one release."
            )


def _entries(config: object, keys: list[str], quantization: dict | None) -> str:
    """Name the entries of config.json that keys which do not fit may come from."""
    if quantization:
        return f"(quantization_config: {quantization.get('quant_method')!r}) "
    if all("mm_projector" in key for key in keys):
        return f"(mm_projector_type: {getattr(config, 'mm_projector_type', None)!r}) "
    return ""


def _finish_embeddings(model: nn.Module, assigner: Assigner, folder: Path) -> None:
    """Tie the output layer if the weights are tied, and take the number of tokens from the weights."""
    config, done, where = model.config, assigner.done, folder / "config.json"
    if config.tie_word_embeddings:
        if EMBEDDINGS in done and HEAD not in done:
            done[HEAD] = done[EMBEDDINGS]
        elif HEAD in done and EMBEDDINGS not in done:
            done[EMBEDDINGS] = done[HEAD]
            model.model.embed_tokens.weight = model.lm_head.weight
        elif HEAD in done and not torch.equal(
            model.lm_head.weight.cpu(), model.model.embed_tokens.weight.cpu()
        ):
            config.tie_word_embeddings = False
            warn(
                f"{where}: tie_word_embeddings is true, but the checkpoint has an output layer of its own "
                f"({done[HEAD]}). It is used. Set tie_word_embeddings to false."
            )
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
    if EMBEDDINGS not in done or HEAD not in done:
        return  # reported as missing
    rows, heads = len(model.model.embed_tokens.weight), len(model.lm_head.weight)
    if rows != heads:
        raise CheckpointError(
            f"{done[EMBEDDINGS]}: a vocabulary of {rows} tokens, but {done[HEAD]} has {heads} (config.json: "
            f"{config.vocab_size}). Tokens were added in training, and one of the two matrices was not saved "
            "with them. Use both from the trained checkpoint."
        )
    if rows != config.vocab_size:
        warn(
            f"{where}: vocab_size is {config.vocab_size}, but the weights are for {rows} tokens. {rows} are "
            f"used. Set vocab_size to {rows}."
        )
        config.vocab_size = model.vocab_size = rows
        model.model.embed_tokens.num_embeddings = model.lm_head.out_features = rows


def _finish(model: nn.Module, placement: Placement, frozen: set[str]) -> None:
    """Make buffers that no file contains, and freeze the tower and quantized weights."""
    rebuild_rotary(model, placement.device_of("model.rotary_emb"))
    for tower in model.get_model().towers():
        tower.restore_buffers()
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise CheckpointError(f"internal error: {len(left)} tensors were not loaded.\n{listing(left)}")
    for name, parameter in model.named_parameters():
        is_tower = name.startswith(tuple(TOWER_PREFIXES.values()))
        parameter.requires_grad_(name not in frozen and not is_tower)

"""What every vision tower does: run to the select layer, and compute the [CLS] row of attention next to it.

Assumes one transformer of Hugging Face shape (embeddings, a list of pre-norm layers). Independent of pruning,
projectors and language models. `clip_encoder.py` and `dinov2_encoder.py` name the parts of each architecture.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.model.multimodal_encoder.clip_text import ClipTexts
from llava.model.multimodal_encoder.cues import CueReader, budgets, cls_row
from llava.model.multimodal_encoder.merging import check_merging, merged_features
from llava.model.transformers_compat import attention_of, layer_function, run_layer

# Crops that share a pass in half precision on CUDA, where a crop has the same bits in any pass. A number of
# crops is a sum of these: nothing is filled up. A LLaVA-NeXT image has 5.
PASS_SIZES = (32, 16, 8, 5, 4, 2, 1)
Runner = Callable[..., "tuple[Tensor, ...]"]  # (key, function, images) -> function(images)


_log = logging.getLogger(__name__)


class VisionTower(nn.Module, ABC):
    """A frozen image encoder with a [CLS] token.

    `tower(images)` with images (B, 3, S, S) of any float dtype returns two tensors:

    - features (B, N, C) in the tower's dtype: `hidden_states[select_layer]` without [CLS], before any final
      norm;
    - attention (B, H, N), float32 or wider: softmax of the [CLS] query over all N + 1 keys in the layer whose
      output `features` is, without the [CLS] column and not renormalized.

    With `cues` (names of `llava.pruning.base.CUES`) it returns them as well, in this order, after the two.

    Layers after the select layer are not built. Every layer runs `attn_implementation` (default: SDPA); the
    one attention row is computed separately, so no (N + 1) x (N + 1) matrix exists.
    """

    kind = ""

    def __init__(
        self,
        model: nn.Module,
        config: object,
        image_processor: object,
        image_size: int,
        select_layer: int,
    ) -> None:
        super().__init__()
        self.vision_tower = model
        self.config = config
        self.image_processor = image_processor
        self.image_size = image_size
        self.select_layer = select_layer
        self.select_feature = "patch"
        self.is_loaded = True  # False until `load_model` of a tower that was built with delay_load
        self._load: Callable[[VisionTower, object], None] | None = None  # reads the weights
        # Crops per pass; None chooses by device and dtype (see `passes`). With a number, every pass has
        # exactly this many crops: the last one is filled up, so that the same kernels see every crop.
        self.group_size: int | None = None
        self.run_layer: Callable[[nn.Module, Tensor], Tensor] = run_layer
        # (device, dtype, crops): whether crops of a pass have the bits that they have alone
        self._same_bits: dict[tuple[torch.device, torch.dtype, int], bool] = {}
        # () -> (key, tensor, file) of the tower's weights, read again for a layer after the select layer
        self.read_weights: Callable[[], Iterable[tuple[str, Tensor, object]]] | None = None
        self.folder: Path | None = None  # of the tower's own files
        self._clip: list[ClipTexts] = []
        self._next_layer: list[nn.Module] = []  # in a list: it is not part of the state dict

    # --- the parts of a layer: one implementation per architecture ------------------------------------------
    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) to the hidden states (B, N + 1, C) that enter the first layer."""

    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """Return the transformer layers up to the select layer."""

    @abstractmethod
    def attention_parts(self, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return (norm before attention, query projection, key projection) of a layer."""

    @abstractmethod
    def attend(self, layer: nn.Module, hidden: Tensor, bias: Tensor) -> Tensor:
        """Run the first half of a layer: (B, T, C) -> (B, T, C), `bias` (B, 1, 1, T) added to the logits."""

    @abstractmethod
    def feed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run the second half of a layer, the MLP: (B, T, C) -> (B, T, C)."""

    def enter(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run what a layer has before its attention over the patches: (B, T, C) -> (B, T, C)."""
        return hidden

    # --- loading -----------------------------------------------------------------------------------------
    def load_model(self, device_map: object = None) -> None:
        """Read the weights of a tower that was built with `delay_load`, in float32; else do nothing.

        Args:
            device_map: a device, "auto" (a GPU if there is one), or {"": device} (default: the CPU).

        Raises:
            FileNotFoundError, CheckpointError: the weights cannot be read, or do not fit.
        """
        if not self.is_loaded and self._load is not None:
            self._load(self, device_map)
            self.requires_grad_(False)
            self.is_loaded = True

    def save_settings(self, folder: Path) -> None:
        """Save the tower's config and image processor, for a checkpoint that contains its weights."""
        self.config.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    # --- running -----------------------------------------------------------------------------------------
    def forward(
        self,
        images: Tensor,
        counts: Sequence[int] | None = None,
        run: Runner | None = None,
        cues: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Encode (B, 3, S, S) to features (B, N, C), attention (B, H, N) and `cues`, in passes.

        The result of an image never depends on the images beside it (see `passes`).

        Args:
            counts: crops of each image (default: every crop is an image); their sum is B.
            run: runs a pass, e.g. from a captured graph: run(key, function, crops) -> function(crops).
            cues: further cues, each (B, ...).

        Raises:
            ValueError: the tower does not have a cue, or the shape is not (B, 3, S, S) with S = `image_size`.
        """
        if not self.is_loaded:
            raise ValueError("vision tower: the weights are not loaded. Call load_model() first.")
        side = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            shape = tuple(images.shape)
            raise ValueError(
                f"images: shape is {shape}, but the vision tower expects (B, 3, {side}, {side}). Use the "
                "checkpoint's image processor."
            )
        if len(images) == 0:
            channels, heads = self.hidden_size, self.config.num_attention_heads
            return (
                torch.empty(0, self.num_patches, channels, dtype=self.dtype, device=self.device),
                torch.empty(0, heads, self.num_patches, dtype=torch.float32, device=self.device),
            )
        cues, found = tuple(cues), []
        self.prepare(cues)
        encode = partial(self.forward_features, cues=cues) if cues else self.forward_features
        for start, end, size in self.passes(images, [1] * len(images) if counts is None else counts):
            part = self.on_device(images[start:end])
            real = end - start
            if real < size:
                part = torch.cat([part, part[-1:].expand(size - real, -1, -1, -1)])
            key = ("crops", cues) if cues else "crops"
            tensors = encode(part) if run is None else run(key, encode, part)
            found.append(tuple(tensor[:real] for tensor in tensors))
        if len(found) == 1:
            return found[0]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def on_device(self, images: Tensor) -> Tensor:
        """Return images on the device of the weights, in their dtype, without waiting for the copy."""
        return images.to(device=self.device, non_blocking=True).to(self.dtype)

    def passes(self, images: Tensor, counts: Sequence[int]) -> list[tuple[int, int, int]]:
        """Choose passes (first crop, last crop + 1, size) for images of `counts` crops.

        On CPU every crop by itself, since larger passes are not faster. In half precision on CUDA all crops
        together, in sizes that were checked to give a crop the bits it has alone. Elsewhere an image's own
        crops: in float32 the bits of a crop depend on the size of its pass.
        """
        total = len(images)
        if self.group_size:
            size = self.group_size
            return [(start, min(start + size, total), size) for start in range(0, total, size)]
        if self.device.type == "cpu":
            sizes = [1] * total
        elif self.merges_images:
            sizes = []
            for size in PASS_SIZES:
                left = total - sum(sizes)
                if size <= left and self._checked(images, size):
                    sizes += [size] * (left // size)
        else:
            sizes = [part for count in counts for part in split(count, range(PASS_SIZES[0], 0, -1))]
        ends = list(accumulate(sizes))
        return [(end - size, end, size) for size, end in zip(sizes, ends, strict=True)]

    @property
    def merges_images(self) -> bool:
        """Whether crops of several images share a pass, because their bits do not depend on it."""
        return self.device.type == "cuda" and self.dtype in (torch.float16, torch.bfloat16)

    @torch.no_grad()
    def _checked(self, images: Tensor, size: int) -> bool:
        """Return whether crops in a pass of `size` have the bits they have alone; tried once per size."""
        key = (self.device, self.dtype, size)
        if size > 1 and key not in self._same_bits:
            crops = self.on_device(images[:size])
            together = self.forward_features(crops)
            if not all(torch.isfinite(one).all() for one in together):
                return False  # NaN has no bits to compare: the next images decide
            self._same_bits[key] = all(
                torch.equal(one[place], alone[0])
                for place in sorted({0, size // 2, size - 1})
                for one, alone in zip(together, self.forward_features(crops[place, None]), strict=True)
            )
            if not self._same_bits[key]:
                _log.warning(
                    "vision tower: in a pass of %d, crops have other bits than alone on this device. Passes "
                    "are smaller, which is slower",
                    size,
                )
        return size == 1 or self._same_bits[key]

    def __getstate__(self) -> dict[str, object]:
        """Leave out a compiled function, which cannot be pickled."""
        own = {"run_layer": run_layer if self.run_layer is run_layer else None, "_clip": []}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        if self.run_layer is None:
            self.compile_layers(True)

    def compile_layers(self, compiled: bool) -> None:
        """Run layers by one compiled function that they share (see `torch.compile`), or as they are."""
        self.run_layer = torch.compile(layer_function(self.layers()[0])) if compiled else run_layer
        self._same_bits.clear()

    def prepare(self, cues: Sequence[str]) -> None:
        """Check that the tower has `cues`, and read weights that only they need. Raises `ValueError`."""
        CueReader(self, cues)
        for tokens in budgets(cues):
            check_merging(self, tokens)
        is_short = len(self.layers()) < self.config.num_hidden_layers
        if is_short and any(cue.startswith("last_") for cue in cues):
            self.next_layer()

    @property
    def clip(self) -> ClipTexts:
        """CLIP's text side, for methods that compare patches with the question. Raises `ValueError`."""
        if not self._clip:
            self._clip.append(ClipTexts(self))
        return self._clip[0]

    def next_layer(self) -> nn.Module:
        """Return the layer after the select layer; its weights are read when it is first needed.

        Raises:
            ValueError: the tower's files do not contain it.
        """
        with torch.inference_mode(False):  # weights that are made within it cannot be moved outside of it
            if not self._next_layer:
                self._next_layer.append(read_next_layer(self))
            return self._next_layer[0].to(device=self.device, dtype=self.dtype)

    def forward_features(self, images: Tensor, cues: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """Run one pass: (B, 3, S, S) in the tower's dtype -> features, attention (see `forward`), cues."""
        trainable = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(trainable):
            hidden = self.embed(images)
            layers = self.layers()
            reader = CueReader(self, cues)
            for number, layer in enumerate(layers[:-1], 1):
                reader.before(number, hidden)
                hidden = self.run_layer(layer, self.enter(layer, hidden))
            norm, query, key = self.attention_parts(layers[-1])
            reader.before(len(layers), hidden)
            hidden = self.enter(layers[-1], hidden)
            row = cls_row(norm(hidden), query, key, self.config.num_attention_heads)
            hidden = self.run_layer(layers[-1], hidden)
            reader.before(len(layers) + 1, hidden)
            for tokens in budgets(cues):
                merged = merged_features(self, images, tokens)
                reader.found |= zip((f"merged@{tokens}", f"merged_groups@{tokens}"), merged, strict=True)
        return hidden[:, 1:], row, *(reader.found[cue] for cue in cues)

    @property
    def crops_per_pass(self) -> int:
        """Most crops of different images that share a pass."""
        return self.group_size or (PASS_SIZES[0] if self.merges_images else 1)

    # --- facts -------------------------------------------------------------------------------------------
    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of `features`."""
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.vision_tower.parameters()).device

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, C), as LLaVA takes for a missing image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """C, channels of a patch feature."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of a crop."""
        return self.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of a crop."""
        return self.num_patches_per_side**2

    @property
    def attn_implementation(self) -> str:
        """Kernels of the layers: sdpa, eager, flash_attention_2 ..."""
        return attention_of(self.vision_tower.config)


def split(count: int, sizes: Iterable[int]) -> list[int]:
    """Write `count` as a sum of `sizes` (descending, ending with 1), the largest first."""
    parts = []
    for size in sizes:
        parts += [size] * (count // size)
        count %= size
    return parts


def read_next_layer(tower: VisionTower) -> nn.Module:
    """Build the layer after a tower's select layer from the tower's files, in its dtype and on its device.

    Raises:
        ValueError: there are no files, or they do not contain the layer.
    """
    last, number = tower.layers()[-1], len(tower.layers())
    layer = copy.deepcopy(last)
    inner = next(name for name, module in tower.vision_tower.named_modules() if module is last)
    table = {tower.canonical(f"{inner}.{name}"): parameter for name, parameter in layer.named_parameters()}
    missing = set(table)
    with torch.no_grad():
        for key, tensor, _ in tower.read_weights() if tower.read_weights is not None else ():
            name = tower.canonical(key)
            if name is None or tower.layer_of(name) != number:
                continue
            name = name.replace(f".{number}.", f".{number - 1}.", 1)
            if name in table and table[name].shape == tensor.shape:
                table[name].copy_(tensor)
                missing.discard(name)
    if missing:
        raise ValueError(
            f"vision tower: layer {number + 1} is not in the tower's files, but the pruning method reads its "
            "attention. Use a tower with all of its layers, or another method."
        )
    return layer


def layers_to_run(select_layer: int, depth: int) -> int:
    """Return how many of `depth` layers make `hidden_states[select_layer]` (entry 0 is the embedding).

    Raises:
        ValueError: there is no such entry, or it is the embedding, which has no attention.
    """
    if isinstance(select_layer, bool) or not isinstance(select_layer, int):
        raise ValueError(f"mm_vision_select_layer: {select_layer!r} is not an integer.")
    count = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 1 <= count <= depth:
        raise ValueError(
            f"mm_vision_select_layer: {select_layer} is not one of the tower's {depth} layers. Choose "
            f"1..{depth} or -{depth}..-1."
        )
    return count

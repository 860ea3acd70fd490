"""LLaVA on a language model of transformers: images in `forward` and `generate`, LLaVA's method names.

`LlavaMetaModel` is mixed into the decoder and adds tower, projector and image_newline; `LlavaMetaForCausalLM`
is mixed into the causal model (see `language_model/`). `visual.py` turns an image into tokens, `splice.py`
inserts them into a prompt.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.entries import CONFIG, check_entries
from llava.model.checkpoint.find import is_hub_name, tower_names
from llava.model.checkpoint.keys import translate
from llava.model.checkpoint.read import check_finite, listing, read_file
from llava.model.clips import join_tags
from llava.model.decode import SWITCHES, Row, generate_inside, id_set
from llava.model.inside import acts_inside
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.video_encoder import VideoTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.runtime.answers import CapturedAnswers
from llava.model.runtime.cache import CapturedGeneration
from llava.model.runtime.stages import INVALID, repeatable_attention
from llava.model.splice import ContextLimits, Spliced, check_tags, splice
from llava.model.visual import USE_CURRENT, VisualTokenMixin
from llava.pruning import Pruner
from llava.pruning.inside import DecoderPruner

_TRAINING_ARGUMENTS = (
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "mm_patch_merge_type",
)


class LlavaMetaModel:
    """Mixed into the decoder (`model.model`): adds towers, `mm_projector`, `image_newline`."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.vision_tower: VisionTower | None = None  # attached by the loader
        self.video_tower: VideoTower | None = None  # of Video-LLaVA, for clips
        if getattr(config, "mm_hidden_size", None):
            self.mm_projector = build_vision_projector(config)
        if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)

    def get_vision_tower(self) -> VisionTower | None:
        """Return the tower for images; that for clips if there is no other."""
        return self.video_tower if self.vision_tower is None else self.vision_tower

    def get_video_tower(self) -> VideoTower | None:
        """Return the tower for clips, None if the model takes only images."""
        return self.video_tower

    def towers(self) -> list[VisionTower]:
        """Return all towers."""
        return [tower for tower in (self.vision_tower, self.video_tower) if tower is not None]

    def initialize_vision_modules(self, model_args: Any, fsdp: object = None) -> None:
        """Attach the vision tower and the projector that training arguments name, as LLaVA's training does.

        A tower or projector that fits is kept; a new projector is untrained. Both are put where the
        embeddings are.

        Args:
            model_args: an object with `vision_tower` and, as far as they are set, mm_vision_select_layer,
                mm_vision_select_feature, mm_projector_type, mm_patch_merge_type and
                pretrain_mm_mlp_adapter (a file such as mm_projector.bin).
            fsdp: must be empty.

        Raises:
            ValueError: an invalid argument; `CheckpointError` for a file that does not fit.
            FileNotFoundError: the tower was not found.
        """
        if fsdp:
            raise ValueError(f"fsdp: {fsdp!r} is not supported. Leave it out.")
        given = {name: getattr(model_args, name, None) for name in _TRAINING_ARGUMENTS}
        check_entries(given, {name: CONFIG[name] for name in given}, "model_args")
        config, weight = self.config, self.embed_tokens.weight
        layer = getattr(model_args, "mm_vision_select_layer", -2)
        wanted = (model_args.vision_tower, layer)
        if self.vision_tower is None or wanted != (config.mm_vision_tower, self.vision_tower.select_layer):
            self.vision_tower = build_vision_tower(model_args)
        elif not self.vision_tower.is_loaded:
            self.vision_tower.load_model()
        self.vision_tower.to(device=weight.device, dtype=weight.dtype)
        width, projector = self.vision_tower.hidden_size, getattr(self, "mm_projector", None)
        if projector is not None and width != config.mm_hidden_size:
            raise ValueError(
                f"vision_tower: {model_args.vision_tower!r} has hidden_size {width}, but the model's "
                f"projector takes {config.mm_hidden_size}. Use the tower that it was trained with."
            )
        config.mm_vision_tower, config.mm_hidden_size, config.use_mm_proj = (
            model_args.vision_tower,
            width,
            True,
        )
        config.mm_vision_select_layer = layer
        config.mm_vision_select_feature = getattr(model_args, "mm_vision_select_feature", "patch")
        config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
        if projector is None:
            config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
            self.mm_projector = build_vision_projector(config).to(weight)
        for parameter in self.mm_projector.parameters():
            parameter.requires_grad = True
        if "unpad" in config.mm_patch_merge_type and not hasattr(self, "image_newline"):
            newline = torch.randn(config.hidden_size) * config.hidden_size**-0.5
            self.image_newline = nn.Parameter(newline.to(weight))
        if adapter := getattr(model_args, "pretrain_mm_mlp_adapter", None):
            self._load_projector(Path(adapter))

    def _load_projector(self, path: Path) -> None:
        found = {translate(key): tensor for key, tensor in read_file(path)}
        names = {f"model.mm_projector.{name}": p for name, p in self.mm_projector.named_parameters()}
        if "model.image_newline" in found and hasattr(self, "image_newline"):
            names["model.image_newline"] = self.image_newline
        own = {name for name in found if name in names or str(name).startswith("model.mm_projector.")}
        wrong = [n for n in sorted(own | set(names)) if n not in own or n not in names]
        wrong += [n for n in sorted(own & set(names)) if found[n].shape != names[n].shape]
        if wrong:
            raise CheckpointError(
                f"{path}: {len(wrong)} weights do not fit mm_projector_type "
                f"{self.config.mm_projector_type!r} from {self.config.mm_hidden_size} to "
                f"{self.config.hidden_size}. Use the file of this tower and language model.\n{listing(wrong)}"
            )
        with torch.no_grad():
            for name, parameter in names.items():
                check_finite(found[name], f"{path}: {name}")
                parameter.copy_(found[name])


class LlavaMetaForCausalLM(VisualTokenMixin, CapturedAnswers, CapturedGeneration):
    """Mixed into a causal language model: encodes, prunes and splices images, then generates.

    `train_step` replaces `forward` of prompts with labels while `llava.train` trains the model.
    """

    train_step: Callable[..., Any] | None = None

    def get_model(self) -> LlavaMetaModel:
        """Return the decoder, which also contains tower and projector."""
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        """Return the vision tower."""
        return self.get_model().get_vision_tower()

    def get_video_tower(self) -> VideoTower | None:
        """Return the tower for clips, None if the model takes only images."""
        return self.get_model().get_video_tower()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
    ):
        """Load a checkpoint of any format that `load_pretrained_model` reads, with its vision tower.

        As in transformers the model is on the CPU unless `device_map` is given, and in evaluation mode; as in
        LLaVA it is float32 unless `dtype` (or `torch_dtype`) is. A bare Llama or Mistral gives a model
        without tower, for `initialize_vision_modules`.

        Args:
            pretrained_model_name_or_path: a folder, or owner/name on the Hugging Face Hub.
            kwargs: config (replaces config.json), device_map, dtype ("auto": the checkpoint's),
                attn_implementation, load_in_8bit, load_in_4bit, revision, cache_dir, token,
                local_files_only, output_loading_info; model_base, visual_token_num, important_ratio,
                method, anyres and tower_dtype as in `load_pretrained_model`; entries of config.json.

        Raises:
            ValueError, FileNotFoundError, TypeError: as `load_pretrained_model`.
        """
        auto = import_module("llava.model.auto")  # by name: loading needs this class
        if not auto.is_language_model(pretrained_model_name_or_path, **kwargs):
            if model_args:
                raise TypeError(f"from_pretrained() got unexpected positional arguments {model_args!r}.")
            return auto.load_model(cls, pretrained_model_name_or_path, **kwargs)
        if kwargs.get("torch_dtype") is None:
            kwargs.setdefault("dtype", torch.float32)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model._complete(info["missing_keys"], pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    def _complete(self, missing: Iterable[str], path: object) -> None:
        """Give a model that was loaded from a bare language model its tower, if its config names one."""
        new = [name for name in missing if name.startswith(("model.mm_projector.", "model.image_newline"))]
        lost = sorted(set(missing) - set(new))
        if lost:
            raise CheckpointError(f"{path}: {len(lost)} missing keys. Download it again.\n{listing(lost)}")
        if new:
            warnings.warn(
                f"{path}: contains no projector: that of the model is untrained. Load its weights, such as "
                "those of mm_projector.bin or non_lora_trainables.bin.",
                stacklevel=3,
            )
        if "model.image_newline" in new:
            nn.init.normal_(self.model.image_newline, std=self.config.hidden_size**-0.5)
        if getattr(self.config, "mm_vision_tower", None) and self.get_vision_tower() is None:
            self.model.vision_tower = build_vision_tower(self.config, delay_load=True)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any):
        """Save as in transformers, the tower included: the folder loads again, wherever it is moved.

        Config and image processor of each tower are saved in a folder of the tower's name. An anyres protocol
        that only followed from the pruner is not saved: whoever loads the folder chooses again.
        """
        followed, renamed = self.config.anyres_protocol, {}
        if self._anyres is None:
            del self.config.anyres_protocol
        for holder, (entry, named) in tower_names(vars(self.config)).items():
            tower = self.model._modules.get(holder)
            if tower is None:  # also while training: then it is outside of the module tree, and not saved
                continue
            name = named[0] if isinstance(named, list) else str(named)
            last = re.split(r"[\\/]", name.rstrip("\\/"))[-1].strip(".:~") or holder
            renamed[entry] = named
            setattr(self.config, entry, name if is_hub_name(name) else last)
            tower.save_settings(Path(save_directory, last))
            if not tower.is_loaded:
                state = kwargs.get("state_dict") or self.state_dict()
                kwargs["state_dict"] = {
                    k: v for k, v in state.items() if not k.startswith(f"model.{holder}.")
                }
        # transformers refuses to save sampling settings without do_sample, as LLaVA-1.5 has them.
        generation, self.generation_config = self.generation_config, GenerationConfig()
        try:
            saved = super().save_pretrained(save_directory, *args, **kwargs)
            single, index = (Path(save_directory, f"model.safetensors{end}") for end in ("", ".index.json"))
            if single.is_file():  # transformers keeps the index of shards that were here before
                index.unlink(missing_ok=True)
            if (path := Path(save_directory, "generation_config.json")).is_file():
                generation.to_json_file(path)
            return saved
        finally:
            self.generation_config = generation
            self.config.anyres_protocol = followed
            for entry, named in renamed.items():
                setattr(self.config, entry, named)

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Give tokenizer and model the image tokens that training arguments name, as LLaVA's training does.

        New embeddings are the mean of the others, or those of `pretrain_mm_mlp_adapter`.

        Args:
            model_args: an object with mm_use_im_patch_token and mm_use_im_start_end and, as far as they are
                set, tune_mm_mlp_adapter and pretrain_mm_mlp_adapter.

        Raises:
            CheckpointError: the file has no embeddings that fit.
        """
        patch = getattr(model_args, "mm_use_im_patch_token", False)
        ends = getattr(model_args, "mm_use_im_start_end", False)
        if patch:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
            self._grow(len(tokenizer))
        new = 0
        if ends:
            names = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
            new = tokenizer.add_tokens(names, special_tokens=True)
            self._grow(len(tokenizer))
        if new and (adapter := getattr(model_args, "pretrain_mm_mlp_adapter", None)):
            self._load_embeddings(Path(adapter), len(tokenizer), new)
        if getattr(model_args, "tune_mm_mlp_adapter", False) and (patch or ends):
            for parameter in self.get_input_embeddings().parameters():
                parameter.requires_grad = ends
            for parameter in self.get_output_embeddings().parameters():
                parameter.requires_grad = False

    def _grow(self, tokens: int) -> None:
        """Add mean embeddings up to `tokens`; a matrix that is padded to more rows keeps them."""
        rows = len(self.get_input_embeddings().weight)
        if tokens > rows:
            self.resize_token_embeddings(tokens, mean_resizing=False)
            with torch.no_grad():
                for matrix in (self.get_input_embeddings().weight, self.get_output_embeddings().weight):
                    matrix[rows:] = matrix[:rows].mean(0, keepdim=True)

    def _load_embeddings(self, path: Path, tokens: int, new: int) -> None:
        found = {translate(key): tensor for key, tensor in read_file(path)}.get("model.embed_tokens.weight")
        weight = self.get_input_embeddings().weight
        if (
            found is None
            or found.shape[1:] != weight.shape[1:]
            or len(found) not in (new, tokens, len(weight))
        ):
            shape = None if found is None else tuple(found.shape)
            raise CheckpointError(
                f"{path}: model.embed_tokens.weight has shape {shape}, expected "
                f"({new}, {weight.shape[1]}) or {tuple(weight.shape)}. Use a file that "
                "was trained with mm_use_im_start_end."
            )
        rows = found if len(found) == new else found[tokens - new : tokens]
        check_finite(rows, f"{path}: model.embed_tokens.weight")
        with torch.no_grad():
            weight[tokens - new : tokens] = rows.to(weight)

    # --- visual tokens into the prompt -------------------------------------------------------------------
    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """Return None, position_ids, attention_mask, past_key_values, inputs_embeds, labels, as in LLaVA.

        position_ids, attention_mask and labels that are None stay None. Without images, or for a single id (a
        decoding step), everything is returned unchanged and inputs_embeds is None. Padding is on
        `config.tokenizer_padding_side` ("right" if unset). Rows longer than tokenizer_model_max_length are
        truncated on the right with a warning.
        """
        if images is None or input_ids.shape[1] == 1:
            if images is None:
                check_tags([input_ids.flatten()], 0)
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        self._refuse_inside("prepare_inputs_labels_for_multimodal")
        side = getattr(self.config, "tokenizer_padding_side", None) or "right"
        visual = self.encode_images(images, image_sizes)
        batch = self._splice(input_ids, attention_mask, labels, visual, side)
        return (
            None,
            None if position_ids is None else batch.position_ids,
            None if attention_mask is None else batch.mask.to(attention_mask.dtype),
            past_key_values,
            batch.embeds,
            None if labels is None else batch.labels,
        )

    def _refuse_inside(self, function: str) -> None:
        """Raise `ValueError` if the pruner acts inside the language model, which `function` would not do."""
        if self.keeps_positions(self.pruner):
            raise ValueError(
                f"{function}: positions='original' is set, which only generate follows. Call generate, or "
                "set_pruner(positions='contiguous')."
            )
        if acts_inside(self.pruner):
            raise ValueError(
                f"{function}: {self.pruner.name!r} prunes inside the language model, which only generate "
                "does. Call generate, or set another pruner with set_pruner."
            )

    def _splice(
        self, input_ids, attention_mask, labels, visual: list[Tensor], side: str, truncate=True, new=0
    ) -> Spliced:
        """Splice images into the prompts.

        Args:
            truncate: cut rows that are too long, with a warning, as LLaVA does in training; else ValueError.
            new: tokens that have to fit after the longest row.
        """
        limits = ContextLimits.of(self.config)
        embed = self.get_input_embeddings()
        device = embed.weight.device
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        labels = None if labels is None else labels.to(device)
        # Video-LLaVA cuts every prompt: two clips are longer than its limit, whatever was asked.
        cut = limits.prompt if truncate or self.get_video_tower() is not None else None
        batch = splice(input_ids, attention_mask, labels, visual, embed, side, cut)
        if not truncate and (reason := limits.refuse(batch.embeds.shape[1], new=new)):
            raise ValueError(f"input_ids: {reason}.")
        return batch

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: object = None,
        visual: list[Tensor] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ):
        """Run the language model with images (or `visual` tokens) spliced into `input_ids`.

        Logits cover the spliced sequence; with `labels` (B, L), aligned with `input_ids`, there is a loss
        over text tokens. Batches padded on the left are padded on the left again, others on
        `config.tokenizer_padding_side`. Prompts that do not fit are truncated with a warning in training (and
        with labels), as in LLaVA.

        Raises:
            ValueError: a prompt without labels does not fit the checkpoint's limits, or the pruner acts
                inside the language model.
        """
        if self.train_step is not None and labels is not None:
            return self.train_step(self, input_ids, labels, attention_mask, images, image_sizes, **kwargs)
        first = input_ids is not None and inputs_embeds is None and input_ids.shape[1] > 1
        if first and (images is not None or visual is not None):
            self._refuse_inside("forward")
            if visual is None:
                visual = self.encode_images(images, image_sizes)
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            before, attention_mask = _split_mask(attention_mask, past, input_ids.shape[1])
            left = attention_mask is not None and not bool(attention_mask[:, 0].all())
            side = "left" if left else getattr(self.config, "tokenizer_padding_side", None) or "right"
            truncate = labels is not None or self.training
            batch = self._splice(input_ids, attention_mask, labels, visual, side, truncate)
            input_ids, inputs_embeds = None, batch.embeds
            labels = None if labels is None else batch.labels
            if before is None and past:
                before = batch.mask.new_ones(len(batch.mask), past)
            seen = batch.mask if before is None else torch.cat([before.bool(), batch.mask], dim=1)
            attention_mask = None if bool(seen.all()) else seen
            position_ids = (seen.cumsum(1) - 1).clamp(min=0)[:, past:] if past else batch.position_ids
        elif first:
            check_tags([input_ids.flatten()], 0)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: object = None,
        attention_mask: Tensor | None = None,
        visual: list[Tensor] | None = None,
        inputs: Tensor | None = None,
        pruner: Pruner | str | None = USE_CURRENT,
        **kwargs,
    ) -> Tensor:
        """Answer prompts.

        Args:
            input_ids: (B, L), or LLaVA's name `inputs`. Prompts of different lengths are padded on either
                side and marked in `attention_mask`.
            images, image_sizes: as for `encode_vision`.
            visual: instead of images, one (K, D) per <image> tag in reading order over the batch: for a clip
                those of every frame (`VisualTokens.parts`).
            pruner: another `Pruner` than the model's own, or None for no pruning. With `visual`, it matters
                only if it acts inside the language model: then decoding is greedy, and a budget per crop is
                multiplied by the number of crops, for `visual` by its length in crops, rounded.
            kwargs: of transformers' `generate`. None counts as not given, but switches off what filters or
                penalizes tokens (top_p, repetition_penalty ...), as in LLaVA, whatever the checkpoint's
                generation_config.json sets.

        Returns:
            New ids only, (B, new). A warning is given if they run past max_position_embeddings.

        Raises:
            ValueError: a prompt does not fit tokenizer_model_max_length or max_position_embeddings; sampling,
                beams and the like with a pruner that acts inside the language model.
        """
        pruner = self._chosen(pruner)
        input_ids = inputs if input_ids is None else input_ids
        kwargs = {k: v for k, v in kwargs.items() if v is not None or k in SWITCHES}
        if not kwargs.get("do_sample", kwargs.get("temperature", 1) != 0):
            # Greedy: scripts pass temperature=0 with top_p, which makes transformers warn.
            kwargs["do_sample"] = False
            for name in ("temperature", "top_p", "top_k"):
                kwargs.pop(name, None)
        kwargs.setdefault("pad_token_id", self._pad_token_id())
        if input_ids is None:
            if images is not None or visual is not None:
                raise ValueError(
                    "images: input_ids is missing. Pass prompts with an <image> tag for each image."
                )
            return super().generate(attention_mask=attention_mask, **kwargs)
        if images is not None and visual is not None:
            raise ValueError("images and visual are both given. Pass one of them.")
        kwargs.pop("position_ids", None)  # those of the prompt before splicing
        given = input_ids, attention_mask, images, image_sizes, visual
        inside = isinstance(pruner, DecoderPruner) and (images is not None or visual)
        if inside or (images is not None and self.keeps_positions(pruner)):
            return self._generate_inside(*given, pruner, kwargs)
        if self.is_plain_greedy(kwargs) and pruner == self.pruner:
            with self.runtime.checked(self):
                found = self.answer_greedily(*given, **kwargs) if self.runtime.decodes(self) else None
            if found is not None:
                return found
        if visual is None:
            visions = [] if images is None else self.encode_vision(images, image_sizes, pruner.cues)
            visual = [part for one in visions for part in self.visual_tokens(one, pruner).parts]
        batch = self._splice(input_ids, attention_mask, None, visual, "left", truncate=False, new=1)
        with repeatable_attention(batch.embeds.device):
            found = super().generate(inputs_embeds=batch.embeds, attention_mask=batch.mask.long(), **kwargs)
        new = found if isinstance(found, Tensor) else found.sequences
        limits = ContextLimits.of(self.config)
        if limits.overrun(batch.embeds.shape[1], new.shape[1]):  # then row by row, without padding
            count = new.ne(-1 if (pad := kwargs["pad_token_id"]) is None else pad).sum(1)
            length = batch.mask.sum(1).repeat_interleave(len(new) // len(batch.mask))
            worst = int((length + count).argmax())
            if reason := limits.overrun(int(length[worst]), int(count[worst])):
                warnings.warn(reason, stacklevel=2)
        return found

    def _generate_inside(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: Tensor | list[Tensor] | None,
        image_sizes: object,
        visual: list[Tensor] | None,
        pruner: Pruner,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Answer prompts as `generate` with a method inside the language model, or original positions."""
        if not self.is_plain_greedy(kwargs):
            why = "positions='original' is set"
            if acts_inside(pruner):
                why = f"{pruner.name!r} prunes inside the language model"
            raise ValueError(
                f"generate: {why}, where only greedy search is supported, got {', '.join(sorted(kwargs))}. "
                "Pass do_sample=False and max_new_tokens=N, and nothing else that changes the search."
            )
        if visual is None:
            visions = self.encode_vision(images, image_sizes, pruner.cues)
            tokens = [self.visual_tokens(one, pruner) for one in visions]
            input_ids, attention_mask = join_tags(input_ids, attention_mask, tokens)
            visual = [one.embeds for one in tokens]
            per_frame = self.clip_budget == "frame"  # otherwise the budget is that of the whole clip
            counts = [len(one.lengths if one.lengths and per_frame else one.kept.indices) for one in tokens]
            more = [(n, None, one.places, one.span) for n, one in zip(counts, tokens, strict=True)]
        else:
            tower = self.get_vision_tower()
            patches = None if tower is None else tower.num_patches
            crops = [1 if patches is None else max(1, round(len(one) / patches)) for one in visual]
            more = [(count, None, None, 0) for count in crops]
        spliced = self._splice(input_ids, attention_mask, None, visual, "left", truncate=False, new=1)
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found, rows = iter(zip(visual, more, strict=True)), []
        for ids, mask in zip(input_ids.cpu(), keep.bool().cpu(), strict=True):
            ids = tuple(ids[mask].tolist())
            of_row = [next(found) for _ in range(ids.count(IMAGE_TOKEN_INDEX))]
            rows.append(Row(ids, tuple(one for one, _ in of_row), None, *(of_row[0][1] if of_row else ())))
        eos = kwargs.get("eos_token_id", self.generation_config.eos_token_id)
        stops = id_set(eos.tolist() if isinstance(eos, Tensor) else eos)
        said = generate_inside(self, rows, pruner, kwargs["max_new_tokens"], stops)
        if any(INVALID in ids for ids in said):
            raise ValueError(
                "generate: the language model computed NaN or infinite logits. Use another dtype or weights."
            )
        limits = ContextLimits.of(self.config)
        lengths = spliced.mask.sum(1).tolist()
        worst = max(zip(lengths, map(len, said), strict=True), key=sum)
        if reason := limits.overrun(*worst):
            warnings.warn(reason, stacklevel=3)
        pad, width = kwargs["pad_token_id"] or 0, max(map(len, said))
        device = spliced.mask.device
        padded = [[*ids, *[pad] * (width - len(ids))] for ids in said]
        return torch.tensor(padded, dtype=torch.long, device=device)

    def _pad_token_id(self) -> int | None:
        eos = self.generation_config.eos_token_id
        end = eos[0] if isinstance(eos, list) else eos
        choices = (self.generation_config.pad_token_id, self.config.pad_token_id, end)
        return next((i for i in choices if i is not None and i >= 0), None)


def _split_mask(mask: Tensor | None, past: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask (B, past + length) or (B, length) into that of the cache (or None) and of the new ids."""
    if mask is None or not past or mask.shape[1] == length:
        return None, mask
    if mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask: {mask.shape[1]} positions, expected {past} of the cache + {length} new ones."
        )
    return mask[:, :past], mask[:, past:]

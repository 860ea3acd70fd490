"""LLaVA's checkpoints in transformers' Auto classes, and `from_pretrained` of LLaVA's model classes.

    import llava
    AutoConfig.from_pretrained("liuhaotian/llava-v1.5-7b")              # our LlavaConfig
    AutoModelForCausalLM.from_pretrained("liuhaotian/llava-v1.5-7b")    # our LlavaLlamaForCausalLM
    AutoConfig.from_pretrained("llava-hf/llava-1.5-7b-hf")              # transformers' own, as without us

Imports neither torch nor transformers until they are needed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

from llava.model.language_model import classes_of, model_type_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AUTO = "transformers.models.auto.configuration_auto"
_DROPPED = (
    "_from_auto",
    "_commit_hash",
    "adapter_kwargs",
    "trust_remote_code",
    "code_revision",
)  # of Auto classes
_HUB = ("cache_dir", "revision", "token", "local_files_only")


def teach_auto_classes() -> None:
    """Make `AutoConfig` read LLaVA's config.json: now, or as soon as transformers is imported."""
    if _AUTO in sys.modules:
        _teach(sys.modules[_AUTO].AutoConfig)
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Waits for the import of transformers' `AutoConfig`, once."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if module.__name__ == _AUTO:  # a loader of a zip archive is shared by its modules
                _teach(module.AutoConfig)

        spec.loader.exec_module = exec_module
        return spec


def _teach(auto_config: type) -> None:
    """Wrap `AutoConfig.from_pretrained` and `.for_model`; what is not LLaVA's goes on unchanged.

    `AutoConfig.register` alone is not enough: "llava" is taken by transformers, and registering needs our
    classes, whose import needs torch.
    """
    from_pretrained, for_model = auto_config.from_pretrained, auto_config.for_model

    @functools.wraps(from_pretrained)
    def load(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        from transformers import PreTrainedConfig

        given = {**kwargs, "_from_auto": True, "name_or_path": pretrained_model_name_or_path}
        for name in ("trust_remote_code", "code_revision"):
            given.pop(name, None)
        stored, unused = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **given)
        model_type = model_type_of(stored)
        if model_type is None:
            return from_pretrained(pretrained_model_name_or_path, **kwargs)
        entries = {name: value for name, value in stored.items() if name != "model_type"}
        return classes_of(model_type)[0].from_dict(entries, **unused)

    @functools.wraps(for_model)
    def make(cls: type, model_type: str, *args: Any, **kwargs: Any) -> Any:
        if model_type_of({"model_type": model_type}) is not None:
            return classes_of(model_type)[0](*args, **kwargs)
        return for_model(model_type, *args, **kwargs)

    auto_config.from_pretrained, auto_config.for_model = classmethod(load), classmethod(make)


def is_language_model(path: Any, model_base: Any = None, **kwargs: Any) -> bool:
    """Return whether `path` is a Llama or Mistral without tower and projector, as training starts from."""
    from llava.model.checkpoint.config import stored_config
    from llava.model.checkpoint.find import tower_names

    hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
    stored = stored_config(path, model_base, **hub)
    return not (tower_names(stored) or "text_config" in stored or model_base)


def load_model(
    cls: type[PreTrainedModel],
    path: Any,
    config: Any = None,
    model_base: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    quantization_config: Any = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint as a model of class `cls`; see `LlavaMetaForCausalLM.from_pretrained`."""
    import torch

    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint.config import stored_config

    kwargs = {name: value for name, value in kwargs.items() if name not in _DROPPED}
    dtype = torch_dtype if dtype is None else dtype
    hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
    stored = stored_config(path, model_base, **hub)
    if not isinstance(config, (dict, type(None))):
        config = cls.config_class.from_pretrained(config) if isinstance(config, str) else config
        config = config.to_dict()
    entries = dict(stored if config is None else config)
    ours = inspect.signature(load_pretrained_model).parameters
    for name in [name for name in kwargs if name in entries and name not in ours]:  # as in transformers
        entries[name] = kwargs.pop(name)
    bits = {
        name: given or _of(quantization_config, name)
        for name, given in (("load_in_8bit", load_in_8bit), ("load_in_4bit", load_in_4bit))
    }
    if quantization_config is not None and not any(bits.values()):
        raise ValueError(
            f"quantization_config: {quantization_config!r} is not supported. Set load_in_8bit or "
            "load_in_4bit."
        )
    if dtype == "auto":
        dtype = entries.get("dtype") or entries.get("torch_dtype")
    _, model, _, _ = load_pretrained_model(
        path,
        model_base,
        load_8bit=bits["load_in_8bit"],
        load_4bit=bits["load_in_4bit"],
        device_map=device_map,
        device=torch.get_default_device() if device_map is None else None,
        dtype=dtype,
        config=entries,
        model_class=cls,
        **kwargs,
    )
    info = {name: [] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    return (model, info) if output_loading_info else model


def _of(settings: Any, name: str) -> bool:
    """Return an entry of a quantization configuration: None, a dict or an object."""
    return bool(settings.get(name) if isinstance(settings, dict) else getattr(settings, name, False))

"""Read weight files shard by shard and assign them to a model that was built without memory.

Files (`.safetensors`, `.bin`, their indices) and parameter names only; independent of the architecture.
`.bin` files are pickles and are always read with `weights_only=True`.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.model.checkpoint import CheckpointError, warn
from llava.model.checkpoint.entries import INDEX, read_entries
from llava.model.checkpoint.find import WEIGHT_FILES

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights that are read
GROWING = (EMBEDDINGS, HEAD)  # may have another number of rows than config.json has tokens
_LISTED = 40
_VISUAL = ("vision_tower", "mm_projector", "image_newline")  # in names of parameters that every image uses
_SHARD = re.compile(r"(pytorch_)?model-\d+-of-\d+\.(bin|safetensors)")
_OTHER_FORMATS = (".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".pth", ".pt", ".npz", ".tflite", ".engine")
_VARIANT = re.compile(r"((pytorch_)?model\.\w+|consolidated.*|diffusion.*)\.(bin|safetensors)")
# Keys of quantized weights: AWQ and GPTQ, bitsandbytes, fp8, compressed tensors, HQQ, EXL2, AQLM, quanto.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map"
    r"|quant_state\.\S+|weight_scale|weight_scale_inv|input_scale|weight_packed|weight_shape|weight_zero_point"
    r"|W_q|q_weight|codes|codebooks)$"
    r"|\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\S+|_data|_scale)$"
)


def find_weight_files(folder: Path, allow_outside: bool = False) -> list[Path]:
    """List the weight files of a checkpoint folder in reading order.

    The order of preference is that of transformers: model.safetensors, its shards, pytorch_model.bin, its
    shards. A warning says if there is more than one.

    Args:
        allow_outside: an index may name files outside the folder.

    Raises:
        CheckpointError: there are none, or an index is unreadable or names a missing file.
    """
    sets = [f for n in WEIGHT_FILES for f in (n, f"{n}.index.json") if (folder / f).is_file()]
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if not sets:
        raise CheckpointError(
            f"{folder}: no weights found; expected model.safetensors, pytorch_model.bin, or one of them in "
            f"shards with its .index.json.{_instead(folder, shards)} Copy the checkpoint's weights into the "
            "folder."
        )
    first, others = sets[0], ", ".join(sets[1:])
    files = [folder / first]
    if first.endswith(".index.json"):
        files = _files_of_index(folder / first, allow_outside, others)
    elif sets[1:2] == [f"{first}.index.json"] and _names(folder / sets[1]) == [first]:
        sets = [first]  # an index of this very file
    if len(sets) > 1:
        warn(
            f"{folder}: several sets of weights. {first} is read, as in transformers, and {others} is not. "
            "Remove the files that are not of this model."
        )
    elif left := sorted(set(shards) - {path.name for path in files}):
        warn(
            f"{folder}: {first} is read, as in transformers, and {len(left)} shards are not in it "
            f"({', '.join(left[:3])}). Remove them if they are of another model, else download {first} again."
        )
    return files


def _instead(folder: Path, shards: list[str]) -> str:
    """Describe what a folder without weights contains: shards, broken links, other formats, checkpoints."""
    names = sorted(path.name for path in folder.iterdir())
    broken = [name for name in names if (folder / name).is_symlink() and not (folder / name).exists()]
    others = [name for name in names if Path(name).suffix in _OTHER_FORMATS or _VARIANT.fullmatch(name)]
    runs = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    for what, found in (
        ("shards without an index", shards),
        ("links to files that do not exist", broken),
        ("weights in a format that is not supported", others),
        ("checkpoints of a run, of which one can be passed", runs),
    ):
        if found:
            return f" There are {what} ({', '.join(found[:3])})."
    return ""


def _names(index: Path) -> list[str]:
    entries = read_entries(index, INDEX)
    if not entries.get("weight_map"):
        raise CheckpointError(f"{index}: not a weight index: no weight_map. Download the file again.")
    names = entries["weight_map"].values()
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise CheckpointError(f"{index}: not a weight index: a file without name. Download the file again.")
    return sorted(set(names))


def _files_of_index(index: Path, allow_outside: bool, others: str) -> list[Path]:
    names = _names(index)
    outside = [name for name in names if _leaves(name)]
    if outside and not allow_outside:
        raise CheckpointError(
            f"{index}: {outside[0]!r} is outside of the checkpoint's folder. Copy the file into the folder, "
            "or allow it with allow_outside=True (VISPRUNER_ALLOW_OUTSIDE=1)."
        )
    files = [index.parent / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        hint = f", or remove the index to read {others}" if others else ""
        raise CheckpointError(
            f"{index}: {len(missing)} missing shards: {', '.join(missing[:_LISTED])}. The download is "
            f"incomplete; download them again{hint}."
        )
    return files


def _leaves(name: str) -> bool:
    """Return whether a file name of an index is a path that leads out of the index's folder."""
    parts = re.split(r"[\\/]", name)
    return ".." in parts or parts[0] == "" or parts[0].endswith(":")


def read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor on CPU) of every tensor of one file. Raises `CheckpointError` for a corrupt file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  (not a dict)
                    yield key, handle.get_tensor(key)
        else:
            yield from _read_pickle(path).items()
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:  # torch's own message advises to disable the protection
        raise CheckpointError(
            f"{path}: cannot be read: it contains more than tensors, or is not a weight file (such as a "
            "Git LFS pointer). Download it again, or ask its author for plain tensors."
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). Check the file."
        ) from error
    except Exception as error:  # safetensors, zip, pickle and OS errors share no base class
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). The file is corrupt or incomplete; "
            "download it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the pre-1.6 file layout cannot be memory-mapped
        state = torch.load(path, map_location="cpu", weights_only=True)
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: not a mapping of names to tensors. Download it again.")
    return state


def read_folder(folder: Path, allow_outside: bool = False) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield (key, tensor, file) for every tensor of a checkpoint folder, one shard in memory at a time.

    Arguments and errors are those of `find_weight_files` and `read_file`; a key in two shards is an error.
    """
    places: dict[str, Path] = {}
    for path in find_weight_files(folder, allow_outside):
        for key, tensor in read_file(path):
            if key in places:
                raise CheckpointError(
                    f"{path}: {key} is also in {places[key].name}. Use the shards of one checkpoint."
                )
            places[key] = path
            yield key, tensor, path


def refuse_quantized(key: str, tensor: Tensor, path: Path, quantization: dict | None) -> None:
    """Raise `CheckpointError` if a tensor is of quantized weights."""
    packed = key.endswith("weight") and (not tensor.is_floating_point() or "float8" in str(tensor.dtype))
    if not packed and _QUANTIZED.search(key) is None:
        return
    known = quantization or {}
    bits = known.get("bits") or known.get("w_bit")
    bits = bits or (4 if known.get("load_in_4bit") else 8 if known.get("load_in_8bit") else None)
    how = f"by {known['quant_method']}" if known.get("quant_method") else f"as {tensor.dtype}"
    how += f" to {bits} bits" if bits else ""
    raise CheckpointError(
        f"{path}: the weights are quantized {how} (first: {key}), which is not supported. Use the original "
        "checkpoint in float16; load_8bit=True or load_4bit=True quantizes it while it is loaded."
    )


def check_finite(tensor: Tensor, origin: str, fatal: bool = True) -> None:
    """Raise `CheckpointError` for NaN and infinite values; `origin` (file, key) is named.

    Args:
        fatal: False gives a warning instead. Values of the language model may never be used (the row of a
            padding token), and the logits of every answer are checked.
    """
    # The extremes are NaN if a value is, and finding them is 60 times as fast as `isfinite` on a CPU.
    if tensor.numel() and not all(map(math.isfinite, (one.item() for one in tensor.aminmax()))):
        beyond = " in the checkpoint, or beyond float16" if tensor.dtype == torch.float16 else ""
        fix = ", or pass dtype='bfloat16' or 'float32'" if beyond else ""
        text = f"{origin}: NaN or infinite values{beyond}. Download the file again{fix}."
        if fatal:
            raise CheckpointError(text)
        warn(text)


class Assigner:
    """Fills a model built on the meta device, tensor by tensor, and records what was assigned.

    Attributes:
        place: gives (dtype, device) of a parameter name.
        wrap: may return a parameter of its own for (name, tensor), such as a quantized weight, or None.
        done: origin of every name that was assigned.
        unexpected: origins of tensors that the model has no parameter for.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Callable[[str], tuple[torch.dtype, torch.device]],
        wrap: Callable[[str, Tensor], nn.Parameter | None] | None = None,
    ) -> None:
        self.model, self.place, self.wrap = model, place, wrap
        self.names = {n for n, _ in model.named_parameters()} | _persistent_buffers(model)
        self.done: dict[str, str] = {}
        self.unexpected: list[str] = []

    def assign(self, name: str, tensor: Tensor, origin: str) -> None:
        """Assign `tensor` to `name`; `origin` (file, key) is named in errors.

        Embeddings and output layer may have any number of rows; the caller compares them.
        """
        if name not in self.names:
            self.unexpected.append(origin)
            return
        if name in self.done:
            raise CheckpointError(
                f"{origin}: a second tensor for {name}; the first is {self.done[name]}. Use the files of one "
                "checkpoint."
            )
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{origin}: {tensor.dtype} ({tensor.layout}), expected floating point numbers. Use the "
                "original checkpoint in float16 or float32."
            )
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        old = getattr(owner, leaf)
        rows = name in GROWING and old.shape[1:] == tensor.shape[1:] and len(tensor)
        if tuple(old.shape) != tuple(tensor.shape) and not rows:
            raise CheckpointError(
                f"{origin}: shape {tuple(tensor.shape)}, but the model built from config.json has "
                f"{tuple(old.shape)} for {name}. Weights and config.json do not match; use one checkpoint's "
                "files."
            )
        dtype, device = self.place(name)
        new = self.wrap(name, tensor) if self.wrap else None
        if new is None:
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
            # a fresh, contiguous copy: a view into a memory-mapped shard would keep the whole file open
            tensor = tensor.contiguous()
            new = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        check_finite(tensor, origin, fatal=any(part in name for part in _VISUAL))
        setattr(owner, leaf, new)
        self.done[name] = origin

    def missing(self, prefix: str = "") -> list[str]:
        """Return the sorted names under `prefix` that nothing was assigned to."""
        return sorted(n for n in self.names - self.done.keys() if n.startswith(prefix))


def _persistent_buffers(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_buffers() if n in model.state_dict()}


def listing(names: Iterable[str]) -> str:
    """Format names for an error message, one per line; the end of a long list is only counted."""
    names = list(names)
    lines = [f"  {n}" for n in names[:_LISTED]]
    if len(names) > _LISTED:
        lines.append(f"  ... and {len(names) - _LISTED} more")
    return "\n".join(lines)

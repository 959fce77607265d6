"""Checkpoint files: read into a `DiT` from any layout, and written in any layout.

official    one file: DiT, SiT, published mediators; .pt with pickled tensors is read, never written
diffattn    a folder, as `DiT.save_pretrained` writes it
diffusers   a folder of `DiTTransformer2DModel`
"""

import argparse
import json
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffattn.models.config import SIZES, check_one_of
from diffattn.models.convert import check_finite, check_loaded
from diffattn.models.convert_names import find_weights
from diffattn.models.dit import DiT

OFFICIAL, NATIVE, DIFFUSERS = "official", "diffattn", "diffusers"
LAYOUTS = (NATIVE, OFFICIAL, DIFFUSERS)
PICKLED, SAFE = (".pt", ".pth"), ".safetensors"
HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
CONFIG_FILE = "config.json"
CLASSES: Mapping[str, type[DiT] | type[DiTTransformer2DModel]] = {
    "DiT": DiT,
    "DiTTransformer2DModel": DiTTransformer2DModel,
}


@dataclass(frozen=True)
class ReadOptions:
    """Settings that the weights do not determine. Only `prediction` and `path` also apply to (diffusers) folders.

    Attributes:
        key: dotted path of the weights in a file; None: found by their names, see `convert_names.find_weights`.
        num_heads: None: of the position biases, or of the published size with this width.
        prediction: "velocity" or "epsilon"; None: velocity of an official file, epsilon of a diffusers folder.
        num_classes: see `DiT.from_official`.
        sample_size: height and width; see `DiT.from_official`.
        path: "linear" or "gvp"; None: linear.
    """

    key: str | None = None
    num_heads: int | None = None
    prediction: str | None = None
    num_classes: int | None = None
    sample_size: int | Sequence[int] | None = None
    path: str | None = None


def read_model(source: Path, options: ReadOptions | None = None) -> tuple[DiT, str]:
    """A model from a file or folder, and the layout it was in.

    Raises:
        ValueError: nothing there, or nothing that can be read; options that do not apply to such a source; weights that
            do not fit. The message names the problem and, for a choice, what is allowed.
    """
    options = options or ReadOptions()
    if source.is_dir():
        return _read_folder(source, options)
    if not source.is_file():
        raise ValueError(f"there is no file or folder {str(source)!r}")
    if options.num_heads is not None and options.num_heads < 1:
        raise ValueError(f"num_heads must be 1 or more, got {options.num_heads}")
    weights = _read_weights(source, options.key)
    model = DiT.from_official(
        weights,
        _num_heads(weights) if options.num_heads is None else options.num_heads,
        options.prediction or "velocity",
        options.num_classes,
        options.sample_size,
        options.path or "linear",
    )
    return model, OFFICIAL


# Folders.


def _read_folder(source: Path, options: ReadOptions) -> tuple[DiT, str]:
    kind = _class_in(source)
    is_native = kind is DiT
    given = {name for name, value in vars(options).items() if value is not None}
    if unused := sorted(given - (set() if is_native else {"prediction", "path"})):
        raise ValueError(f"{', '.join(unused)}: {str(source)!r} has a configuration that says so; leave it out")
    first = _first_weights(source)
    try:
        with safe_open(first, framework="pt") as file:
            dtype = file.get_tensor(next(iter(file.keys()))).dtype
        loaded: Any = kind.from_pretrained(
            source, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, TypeError) as error:
        raise ValueError(f"{str(source)!r} cannot be read: {error}") from None
    model, found = loaded
    check_loaded(source, found)
    check_finite(model.state_dict())
    if isinstance(model, DiT):
        return model.eval(), NATIVE
    return DiT.from_diffusers(model, options.prediction or "epsilon", options.path or "linear"), DIFFUSERS


def _class_in(folder: Path) -> type[DiT] | type[DiTTransformer2DModel]:
    """The class named in a model folder."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        hint = "; of a pipeline, give the folder of its transformer" if (folder / "model_index.json").is_file() else ""
        raise ValueError(f"{str(folder)!r} is not a model folder: it has no {CONFIG_FILE}{hint}")
    try:
        name = json.loads(path.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a readable configuration: {error}") from None
    if name not in CLASSES:
        raise ValueError(f"{str(folder)!r} contains a {name}; what can be converted: {', '.join(CLASSES)}")
    return CLASSES[name]


def _first_weights(folder: Path) -> Path:
    files = sorted(folder.glob(f"*{SAFE}"))
    if not files:
        raise ValueError(f"{str(folder)!r} has no weights in {SAFE} files")
    return files[0]


# Files.


def _read_weights(source: Path, key: str | None) -> dict[str, Tensor]:
    """The weights of an official file by name; their location and name prefix are detected in either format."""
    if source.suffix == SAFE:
        try:
            return find_weights(load_file(source), key, source.name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{str(source)!r} is not a readable safetensors file: {error}") from None
    if source.suffix not in PICKLED:
        raise ValueError(f"a checkpoint file ends in {', '.join((*PICKLED, SAFE))}, got {source.name!r}")
    content = _read_pickle(source)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source.name!r} contains a {type(content).__name__}, not weights by name")
    return find_weights(content, key, source.name)


def _read_pickle(source: Path) -> Any:
    """The content of a .pt file, tensors and plain values only (including a program's arguments)."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about old or foreign pickles
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: a damaged pickle fails wherever the reader happens to be
        raise ValueError(f"{str(source)!r} is not read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The problem in one sentence; torch's own messages advise switching the protection off."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it contains more than weights ({found[1].rstrip(',')}), which could run code; save a state_dict() alone"
        )
    if "TorchScript" in text:
        return "it is a TorchScript archive; save the model's state_dict() instead"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "zip archive" in text:
        return "it is cut off or damaged"
    return "it is not a checkpoint of tensors and plain values written by torch.save, or it is damaged"


def _num_heads(weights: Mapping[str, Tensor]) -> int:
    """Heads: the position biases have one axis for them; else those of the published size with this width."""
    for name, weight in weights.items():
        if name.endswith("attn.an_bias"):
            return weight.shape[0] if weight.ndim else 1
    patch = weights.get("x_embedder.proj.weight")
    if patch is None or not patch.ndim:
        return 1  # not such a checkpoint, as the check of the names will report
    if patch.shape[0] not in HEADS:
        widths = ", ".join(f"{width}: {heads}" for width, heads in HEADS.items())
        raise ValueError(f"a width of {patch.shape[0]} is none of the published ones ({widths}); give num_heads")
    return HEADS[patch.shape[0]]


# Writing.


def write_model(
    model: DiT, dest: Path, layout: str, *, num_mediators: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a model atomically.

    Args:
        model: cast to `dtype` in place.
        dest: a .safetensors file for the official layout, a folder for the others; replaced if it exists.
        layout: one of `LAYOUTS`.
        num_mediators: n whose position biases an official file gets; see `DiT.to_official`.
        dtype: None: the weights' own.

    Raises:
        ValueError: see `check_destination`, or the layout has no room for this model.
        OSError: the disk is full or not writable.
    """
    check_destination(dest, layout, force=True)
    if num_mediators is not None and layout != OFFICIAL:
        raise ValueError(f"num_mediators={num_mediators} applies to the official layout; a folder keeps every number")
    nn.Module.to(model, dtype or model.x_embedder.proj.weight.dtype)  # with the position embedding
    official = model.to_official(num_mediators) if layout == OFFICIAL else {}
    written = model.to_diffusers() if layout == DIFFUSERS else model
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as place:
        new = Path(place) / dest.name
        try:
            if layout == OFFICIAL:
                save_file({name: weight.contiguous() for name, weight in official.items()}, new)
                new.chmod(0o644)
            else:
                written.save_pretrained(new)
        except SafetensorError as error:
            raise OSError(f"cannot write {str(dest)!r}: {error}") from None
        if dest.is_dir():
            dest.replace(Path(place) / "old")
        new.replace(dest)


def check_destination(dest: Path, layout: str, force: bool) -> None:
    """Raises `ValueError` if a model cannot be written there in this layout, or would replace something else.

    Args:
        dest: file or folder.
        layout: one of `LAYOUTS`.
        force: replace a file, or a folder in which there is a model and nothing else.
    """
    check_one_of("layout", layout, LAYOUTS)
    is_file = layout == OFFICIAL
    if is_file and dest.suffix != SAFE:
        raise ValueError(f"the official layout is written as a {SAFE} file, got {str(dest)!r}")
    if not is_file and dest.suffix in (*PICKLED, SAFE):
        raise ValueError(f"the {layout} layout is a folder, got the name of a file, {str(dest)!r}")
    if not dest.exists():
        return
    if dest.is_dir() == is_file:
        raise ValueError(f"{str(dest)!r} is a {'folder' if is_file else 'file'} already")
    others = [] if is_file else [x.name for x in dest.iterdir() if x.name != CONFIG_FILE and not _is_weights(x.name)]
    if others:
        raise ValueError(f"{str(dest)!r} contains other things than a model ({', '.join(sorted(others)[:5])})")
    if not force and (is_file or any(dest.iterdir())):
        raise ValueError(f"{str(dest)!r} exists; --force replaces it")


def _is_weights(name: str) -> bool:
    return name.startswith("diffusion_pytorch_model") and name.endswith((SAFE, f"{SAFE}.index.json"))

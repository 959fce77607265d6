"""Diffusers pipelines by name: embedded in the package, in a local folder, or on the hub. Safetensors only."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn

from diffattn.drawing.variants import choose_variant, variants_in
from diffattn.files import read_json, read_text
from diffattn.sampling import SiTPipeline

INDEX = "model_index.json"
BROKEN = (OSError, ValueError, AttributeError, SafetensorError)
"""Errors raised when loading damaged or missing files."""

CONFIGS = ("config.json", "scheduler_config.json")
"""Files that configure a part of a pipeline. Those of a tokenizer may hold numbers too large to be read here."""

T5 = ("text_encoder_3", "tokenizer_3")
"""Parts that Stable Diffusion 3 may be saved without; diffusers then loads it only if they are given as None."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)  # 96: the longest name on the hub


@dataclass(frozen=True)
class Embedded:
    """A model shipped with the package."""

    what: str
    guidance: float  # the scale its card recommends
    extractor: str  # of features by which its pictures are judged


EMBEDDED = {
    "emoji-sd": Embedded("a small StableDiffusionPipeline that draws emoji from text", 1.5, "emoji-classifier"),
    "emoji-mmdit": Embedded("a small StableDiffusion3Pipeline that draws the same emoji", 1.5, "emoji-classifier"),
    "emoji-sit": Embedded("a small SiTPipeline with mediators that draws emoji by class", 1.5, "emoji-classifier"),
    "cifar-sit": Embedded("a smaller SiTPipeline that draws the classes of CIFAR-10", 1.5, "cifar-classifier"),
}


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model."""
    return Path(str(files("diffattn") / "assets" / name))


def embedded_models() -> list[str]:
    """Names of the embedded models that are installed."""
    return [name for name in EMBEDDED if (embedded_folder(name) / INDEX).is_file()]


def load_demo(name: str = "emoji-sd", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """An embedded model as a ready diffusers pipeline, without a network, on the CPU.

    Raises:
        ValueError: no embedded model of this name; the message lists the existing ones.
    """
    if name not in embedded_models():
        raise ValueError(f"unknown embedded model {name!r}; available: {', '.join(embedded_models()) or 'none'}")
    return _from_pretrained(embedded_folder(name), dtype)


def load_pipeline(model: str, dtype: torch.dtype = torch.float32, variant: str | None = None) -> DiffusionPipeline:
    """A diffusers pipeline on the CPU.

    Args:
        model: the name of an embedded model, a folder in diffusers' layout, or an id on the hub ("owner/name"),
            looked for in this order.
        dtype: precision of all its parts.
        variant: of the weights, such as "fp16"; components without it are loaded plain. None: plain weights, or the
            only variant that there is.

    Raises:
        ValueError: none of these; a folder that is not a model; weights that are pickles; a missing variant; a model
            that is not on the hub, or a hub that cannot be reached.
    """
    if model in embedded_models():
        if variant is not None:
            raise ValueError(f"embedded model {model!r} has no variants, got {variant!r}")
        return load_demo(model, dtype)
    if _exists(model):
        return _from_folder(Path(model), dtype, variant)
    if HUB_ID.fullmatch(model):
        return _from_hub(model, dtype, variant)
    raise ValueError(
        f"no model {model!r}: not a folder, not a hub id (owner/name), and not an embedded model "
        f"({', '.join(embedded_models()) or 'none installed'})"
    )


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # a name that is too long
        return False


def _from_pretrained(model: str | Path, dtype: torch.dtype, variant: str | None = None) -> DiffusionPipeline:
    """Load with the class named in the model's index, since diffusers only knows its own classes."""
    own = {kind.__name__: kind for kind in (SiTPipeline,)}
    index: Any = DiffusionPipeline.load_config(model)
    name = index["_class_name"]
    kind = own.get(name, DiffusionPipeline)
    absent: dict[str, Any] = {}
    if name.startswith("StableDiffusion3"):
        absent = {part: None for part in T5 if not any(index.get(part) or ())}
    with _default_dtype_kept():
        pipe = kind.from_pretrained(model, dtype=dtype, use_safetensors=True, variant=variant, **absent)
    _check_complete(model, pipe)
    return pipe


@contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """Within the block torch's default dtype may change: diffusers leaves its own behind if a part cannot be loaded."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_complete(model: str | Path, pipe: DiffusionPipeline) -> None:
    """Raise for weights missing from the files, which diffusers only logs and leaves uninitialised."""
    lacking = [
        f"{part}.{name}"
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for name, weight in (*module.named_parameters(), *module.named_buffers())
        if weight.is_meta
    ]
    if lacking:
        more = f" and {len(lacking) - 12} more" if len(lacking) > 12 else ""
        raise ValueError(f"{str(model)!r} lacks weights: {', '.join(lacking[:12])}{more}")


def _from_folder(folder: Path, dtype: torch.dtype, variant: str | None) -> DiffusionPipeline:
    if folder.is_file():
        why = "a pickle, which can run code when loaded" if folder.suffix in PICKLES else "a single file"
        raise ValueError(f"{str(folder)!r} is {why}; give a folder in diffusers' layout with safetensors weights")
    parts = _parts(folder)
    _check_configs(folder, parts)
    _refuse_pickles(folder, parts)
    files = _files_in(folder)
    variant = choose_variant(str(folder), variants_in(files, parts), variant)
    bare = [f for f in files if "." not in f.rpartition("/")[2] and f.partition("/")[0] in parts]
    if variant is not None and bare:  # which diffusers mistakes for a name with a variant
        raise ValueError(f"variants cannot be read beside {bare[0]!r}, a name without a dot; remove it from {folder}")
    try:
        return _from_pretrained(folder, dtype, variant)
    except (*BROKEN, TypeError, LookupError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"{str(folder)!r} could not be loaded: {_first_line(error)}") from error


def _files_in(folder: Path) -> list[str]:
    """The files of a pipeline's components, relative to its folder."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*")) if path.is_file()]


def _parts(folder: Path) -> list[str]:
    """Names of the parts of the pipeline in a folder; raises `ValueError` if there is no pipeline."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{str(folder)!r} is not a model: it has no {INDEX}")
    try:
        index = read_text((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} is not a model: its {INDEX} is not JSON: {error}") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{str(folder)!r} is not a model: its {INDEX} names no pipeline class")
    if not isinstance(index.get("id2label", {}), dict | None):
        raise ValueError(f"{str(folder)!r} is not a model: id2label in its {INDEX} is not an object of id and name")
    return [name for name in index if not name.startswith("_")]


def _check_configs(folder: Path, parts: list[str]) -> None:
    """Raise `ValueError` for a part whose configuration is not a JSON object, or is nested too deeply."""
    for part in parts:
        for path in (folder / part / name for name in CONFIGS):
            if path.is_file():
                read_json(path)


def _refuse_pickles(folder: Path, parts: list[str]) -> None:
    """Raise for a part of the pipeline whose only weights are pickles, naming the file."""
    for part in parts:
        here = [path for path in sorted((folder / part).glob("*")) if path.is_file()]
        pickles = [path for path in here if path.suffix in PICKLES]
        if pickles and not any(path.suffix == ".safetensors" for path in here):
            raise ValueError(
                f"refused: {str(pickles[0])!r} is a pickle, which can run code when loaded; "
                "only weights saved as safetensors are loaded"
            )


def _from_hub(model: str, dtype: torch.dtype, variant: str | None) -> DiffusionPipeline:
    try:
        return _from_pretrained(model, dtype, variant)
    except RepositoryNotFoundError as error:
        raise ValueError(f"the hub has no model {model!r}, or it is private") from error
    except BROKEN as error:
        message = str(error)
        is_unreachable = _is_unreachable(error)
        there = variants_in(_cached_files(model) if is_unreachable else _files_on_hub(model))
        if there and (chosen := choose_variant(model, there, variant)) != variant:  # the only one there is
            return _from_hub(model, dtype, chosen)
        if is_unreachable:
            why = "it is not in the local cache and the hub could not be reached"
        elif "safetensors" in message:
            why = "it has no safetensors weights, and pickles are refused"
        else:
            why = _first_line(error)
        raise ValueError(f"model {model!r} could not be loaded: {why}") from error


def _is_unreachable(error: BaseException) -> bool:
    """Whether an error while loading was caused by a hub that does not answer."""
    message = str(error)
    if "not fully cached" in message or "cached snapshot" in message:
        return True
    names = []
    cause: BaseException | None = error
    while cause is not None:
        names.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return not {"ConnectError", "ConnectTimeout", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}.isdisjoint(names)


def _files_on_hub(model: str) -> list[str]:
    """The files of a model on the hub, or in the local cache if the hub does not answer."""
    try:
        return list_repo_files(model)
    except (OSError, ValueError, HfHubHTTPError):
        return _cached_files(model)


def _cached_files(model: str) -> list[str]:
    """The files of a model of the hub in the local cache; none if it is not there."""
    try:
        return _files_in(Path(snapshot_download(model, local_files_only=True)))
    except (OSError, ValueError):
        return []


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""The initial weights of a model: random, or taken from another model that is compatible."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffattn.models import DiT
from diffattn.models.convert import check_names, check_shapes

CLASS_TABLE = "y_embedder.embedding_table.weight"
"""The class table: one row per class, and a last one for the null class if there is one."""

UNSEEN = ("num_heads", "norm_eps", "frequency_shift", "prediction", "time_direction")
"""Settings that change the meaning of weights but not their shapes: they must be equal in a model and its start."""


def load_backbone(source: str | Path, num_heads: int) -> DiT:
    """A model from a diffattn folder (its `transformer` subfolder too), or an official `.safetensors` file.

    Raises:
        ValueError: neither of these, unreadable, or with weights that are NaN or infinite; missing and unexpected
            weights are named.
    """
    path = Path(source)
    try:
        if path.suffix == ".safetensors" and path.is_file():
            return _finite(DiT.from_official(load_file(path), num_heads=num_heads), source)
        if path.is_dir():
            inner = path / "transformer"
            return _finite(DiT.from_pretrained(inner if inner.is_dir() else path, use_safetensors=True), source)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(source)!r} cannot be read: {error}") from None
    raise ValueError(
        f"{str(source)!r} is neither a folder with a DiT nor an official .safetensors file; "
        "`diffattn convert` makes one of them from a .pt file"
    )


def _finite(model: DiT, source: str | Path) -> DiT:
    broken = [name for name, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"{str(source)!r} has weights that are NaN or infinite: {', '.join(broken[:5])}")
    return model


def weights_hash(source: str | Path | None) -> str | None:
    """A short SHA-256 of the weights that `load_backbone` would read, wherever they are; None for no source."""
    if source is None:
        return None
    path, digest = Path(source), hashlib.sha256()
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    for file in [path] if path.is_file() else sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


def class_names_of(source: str | Path) -> list[str]:
    """The classes of a saved pipeline in the order of their ids; empty if the source does not name them."""
    index = Path(source) / "model_index.json"
    if not index.is_file():
        return []
    id2label = json.loads(index.read_text()).get("id2label") or {}
    return [id2label[key] for key in sorted(id2label, key=int)]


def start_from(model: DiT, source: DiT) -> list[str]:
    """Give `model` the weights of `source`, whose layers may have another attention, or another grid.

    Each layer decides what it takes from the other (see `models.attention_layer.Attention.take`): everything from its
    own kind, with grid-dependent weights resized; from another kind, whatever a softmax layer also has. Its remaining
    weights keep their initial values, chosen so that the first step is close to plain attention.

    Returns:
        The parameters not taken from `source`.

    Raises:
        ValueError: naming the missing and the unexpected weights, those of the wrong shape, or the settings that
            differ although the weights would fit.
    """
    _check_unseen(model, source)
    given, new = dict(source.state_dict()), []
    for i, (block, theirs) in enumerate(zip(model.blocks, source.blocks, strict=False)):
        weights, left = _taken(block, theirs)
        given = {name: w for name, w in given.items() if not name.startswith(f"blocks.{i}.")}
        given |= {f"blocks.{i}.{name}": weight for name, weight in weights.items()}
        new += [f"blocks.{i}.{name}" for name in left]
    own = model.state_dict()
    given |= {name: own[name] for name in new}
    new += _fit_null_class(model, source, own, given)
    check_names(own, given)
    check_shapes(own, given)
    model.load_state_dict(given)
    return new


def _fit_null_class(model: DiT, source: DiT, own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """Drop or add the row of the null class in `given`; returns the parameters not taken from `source` alone."""
    classes, theirs = model.config["num_classes"], source.config["num_classes"]
    if CLASS_TABLE not in given or model.config["null_class"] == source.config["null_class"]:
        return []
    if classes != theirs:
        raise ValueError(f"the start has {theirs} classes, the data {classes}")
    if not model.config["null_class"]:
        given[CLASS_TABLE] = given[CLASS_TABLE][:-1]
        return []
    given[CLASS_TABLE] = torch.cat([given[CLASS_TABLE], own[CLASS_TABLE][-1:]])
    return [CLASS_TABLE]


def _taken(block: Any, theirs: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that a block takes from another one, and the names of its remaining weights."""
    attention = block.attn.take(theirs.attn)
    left = [f"attn.{name}" for name in block.attn.state_dict() if name in block.attn.own_names() - set(attention)]
    kept = {name: weight for name, weight in theirs.state_dict().items() if not name.startswith(("attn.", "cpe"))}
    for name, weight in block.state_dict().items():
        if name.startswith("cpe"):  # the convolutions before some kinds of attention
            if name in theirs.state_dict():
                kept[name] = theirs.state_dict()[name]
            else:
                left.append(name)
                nn.init.zeros_(weight)
    return kept | {f"attn.{name}": weight for name, weight in attention.items()}, left


def _check_unseen(model: DiT, source: DiT) -> None:
    """Raise one `ValueError` that names the settings in `UNSEEN` that differ, and a remedy."""
    there = {name: source.config[name] for name in UNSEEN if source.config[name] != model.config[name]}
    if not there:
        return
    differing = "; ".join(f"{name} is {value!r} there and {model.config[name]!r} here" for name, value in there.items())
    if "prediction" in there or "time_direction" in there:
        hint = "training learns velocities; `diffattn convert --prediction velocity` converts an official DiT"
    else:
        hint = "set " + " ".join(f"model.{name}={value}" for name, value in there.items())
    raise ValueError(f"the weights of the start have another meaning in this model: {differing}; {hint}")


def make_model(arguments: dict, start: str | None, device: torch.device | str = "cpu") -> tuple[DiT, list[str]]:
    """A new model, and the parameters that did not come from `start` (all of them without a start)."""
    model = DiT(**arguments)
    new = [name for name, _ in model.named_parameters()]
    if start is not None:
        new = start_from(model, load_backbone(start, arguments["num_heads"]))
    nn.Module.to(model, device)
    return model, new

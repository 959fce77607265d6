"""What a model begins with: nothing, or the weights of another one that it can make sense of."""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffattn.functional.position_bias import resize_axis, resize_mediators
from diffattn.models import DiT
from diffattn.models.attention import MEDIATOR_AXIS, MediatorAttention
from diffattn.models.convert import check_names, check_shapes

GRID_AXIS = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
"""The position biases that follow the grid -> the axis of its rows or columns."""

CLASS_TABLE = "y_embedder.embedding_table.weight"
"""One row per class, and a last one for the null class where there is one."""

UNSEEN = ("num_heads", "norm_eps", "frequency_shift", "prediction", "time_direction")
"""What weights fit whatever it is, and mean something else by: it must be the same in a model and in its start."""


def load_backbone(source: str | Path, num_heads: int) -> DiT:
    """A model from a folder of ours (its `transformer` subfolder too), or an official `.safetensors` file.

    Raises:
        ValueError: neither of them, or not readable; missing and unexpected weights are named.
    """
    path = Path(source)
    try:
        if path.suffix == ".safetensors" and path.is_file():
            return DiT.from_official(load_file(path), num_heads=num_heads)
        if path.is_dir():
            inner = path / "transformer"
            return DiT.from_pretrained(inner if inner.is_dir() else path, use_safetensors=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(source)!r} cannot be read: {error}") from None
    raise ValueError(
        f"{str(source)!r} is neither a folder with a DiT nor an official .safetensors file; "
        "`diffattn convert` makes one of them from a .pt file"
    )


def weights_hash(source: str | Path | None) -> str | None:
    """A short SHA-256 of the weights that `load_backbone` would read, wherever they lie; None for no source."""
    if source is None:
        return None
    path, found = Path(source), hashlib.sha256()
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    for file in [path] if path.is_file() else sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()[:12]


def class_names_of(source: str | Path) -> list[str]:
    """The classes of a saved pipeline in the order of their ids; empty where the source does not say."""
    index = Path(source) / "model_index.json"
    if not index.is_file():
        return []
    id2label = json.loads(index.read_text()).get("id2label") or {}
    return [id2label[key] for key in sorted(id2label, key=int)]


def start_from(model: DiT, source: DiT) -> list[str]:
    """Give `model` the weights of `source`, which may have softmax in the place of mediators, or another grid.

    Position biases are resized to the grid, or to the number of mediators where `source` has another. Where it has
    none, biases keep their small random values and the depth-wise convolution begins at zero, so that the first
    step sees plain attention through mediators.

    Returns:
        The parameters that `source` did not decide.

    Raises:
        ValueError: naming the missing and the unexpected weights, those of the wrong shape, or the settings that
            differ although the weights would fit.
    """
    _check_unseen(model, source)
    own, given = model.state_dict(), dict(source.state_dict())
    new: list[str] = []
    for i, block in enumerate(model.blocks):
        theirs = source.blocks[i].attn if i < len(source.blocks) else None
        prefix = f"blocks.{i}.attn."
        if not isinstance(block.attn, MediatorAttention):
            given = {k: w for k, w in given.items() if not (k.startswith(prefix) and _is_mediators(k))}
        elif isinstance(theirs, MediatorAttention):
            given = {k: w for k, w in given.items() if not k.startswith(f"{prefix}biases.")}
            given |= _fitted_biases(block.attn, theirs, prefix)
        elif theirs is not None:
            nn.init.zeros_(block.attn.dwc.weight)
            nn.init.zeros_(block.attn.dwc.bias)  # type: ignore[arg-type]
            new += [k for k in own if k.startswith(prefix) and _is_mediators(k)]
    own = model.state_dict()
    given |= {name: own[name] for name in new}
    new += _fit_null_class(model, source, own, given)
    check_names(own, given)
    check_shapes(own, given)
    model.load_state_dict(given)
    return new


def _fit_null_class(model: DiT, source: DiT, own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """Drop or add the row of the null class in `given`; the parameters that `source` did not decide alone."""
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


def _check_unseen(model: DiT, source: DiT) -> None:
    """Raises one `ValueError` that names the settings in `UNSEEN` that differ, and what helps."""
    there = {name: source.config[name] for name in UNSEEN if source.config[name] != model.config[name]}
    if not there:
        return
    told = "; ".join(f"{name} is {value!r} there and {model.config[name]!r} here" for name, value in there.items())
    if "prediction" in there or "time_direction" in there:
        hint = "training learns velocities; `diffattn convert --prediction velocity` takes an official DiT for such"
    else:
        hint = "set " + " ".join(f"model.{name}={value}" for name, value in there.items())
    raise ValueError(f"the weights of the start mean something else in this model: {told}; {hint}")


def _is_mediators(name: str) -> bool:
    return re.search(r"\.attn\.(biases|dwc)\.", name) is not None


def _fitted_biases(ours: MediatorAttention, theirs: MediatorAttention, prefix: str) -> dict[str, Tensor]:
    """Their biases at our numbers of mediators and on our grid; the nearest number where there is no other."""
    fitted = {}
    for n in ours.mediators:
        inside = min(theirs.mediators) <= n <= max(theirs.mediators)
        nearest = n if inside else min(theirs.mediators, key=lambda m: abs(m - n))
        biases = theirs.biases_at(nearest)
        for name, like in ours.biases_at(n).items():
            bias = resize_mediators(biases[name], MEDIATOR_AXIS[name], n)
            if name in GRID_AXIS:
                bias = resize_axis(bias, GRID_AXIS[name], like.shape[GRID_AXIS[name]])
            fitted[f"{prefix}biases.{n}.{name}"] = bias.detach().to(like.dtype)
    return fitted


def make_model(arguments: dict, start: str | None, device: torch.device | str = "cpu") -> tuple[DiT, list[str]]:
    """A new model, and the parameters that did not come from `start` (all of them without one)."""
    model = DiT(**arguments)
    new = [name for name, _ in model.named_parameters()]
    if start is not None:
        new = start_from(model, load_backbone(start, arguments["num_heads"]))
    nn.Module.to(model, device)
    return model, new

"""The layout of official DiT and SiT checkpoints, and of published mediator checkpoints.

Our own layout is the official one except for two things: the position embedding is not stored, and the position biases
are under `attn.biases.{n}`, to allow several numbers of mediators. Nothing here builds a model.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from diffattn.models.layers import position_embedding
from diffattn.models.mediator import MEDIATOR_AXIS

Weights = Mapping[str, Tensor]

TIME_DIRECTION = {"velocity": "noise_to_data", "epsilon": "data_to_noise"}
"""Prediction -> time direction of its official checkpoints: SiT, DiT."""

LINEAR = ("weight", "bias")
TOP_KEYS = {
    "pos_embed",
    "y_embedder.embedding_table.weight",
    *(
        f"{module}.{part}"
        for module in (
            "x_embedder.proj",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "final_layer.linear",
            "final_layer.adaLN_modulation.1",
        )
        for part in LINEAR
    ),
}
BLOCK_KEYS = {
    f"{module}.{part}"
    for module in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    for part in LINEAR
}
MEDIATOR_KEYS = {f"attn.{name}" for name in (*MEDIATOR_AXIS, "dwc.weight", "dwc.bias")}
QK_NORM_KEYS = {"attn.q_norm.weight", "attn.k_norm.weight"}

DIMENSIONS = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "attn.an_bias": 4,
    "attn.ah_bias": 5,
    "attn.aw_bias": 5,
    "mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
    "y_embedder.embedding_table.weight": 2,
}
"""The weights whose shapes are read, by the suffixes of their names."""


def official_config(
    weights: Weights, num_heads: int, prediction: str, num_classes: int | None, sample_size: Sequence[int] | int | None
) -> dict[str, Any]:
    """The configuration of an official checkpoint, derived from its names and shapes; see `DiT.from_official`."""
    if prediction not in TIME_DIRECTION:
        raise ValueError(f"prediction must be one of {', '.join(TIME_DIRECTION)}, got {prediction!r}")
    attention = _check_names(weights)
    _check_dimensions(weights)
    check_finite(weights)
    hidden, in_channels, patch, _ = weights["x_embedder.proj.weight"].shape
    mediators = _mediators(weights, attention, num_heads)
    grid = _grid(weights, attention, hidden, patch, sample_size)
    return {
        "sample_size": [side * patch for side in grid],
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "num_layers": len(attention),
        "num_heads": num_heads,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        "learn_sigma": _learns_sigma(weights, in_channels * patch**2),
        "prediction": prediction,
        "time_direction": TIME_DIRECTION[prediction],
        "attention": attention if mediators else "softmax",
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        **_classes(weights, num_classes),
        **({"mediators": mediators} if mediators else {}),
    }


def _check_names(weights: Weights) -> list[str]:
    """The attention of every block, after checking that exactly the expected weights are present.

    Raises:
        ValueError: naming the missing and the unexpected weights.
    """
    found = [int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))]
    depth = max(found, default=0) + 1
    qk_norm = any(key.endswith(tuple(QK_NORM_KEYS)) for key in weights)
    attention, expected = [], set(TOP_KEYS)
    for i in range(depth):
        has_mediators = any(f"blocks.{i}.{key}" in weights for key in MEDIATOR_KEYS)
        attention.append("mediator" if has_mediators else "softmax")
        keys = BLOCK_KEYS | (MEDIATOR_KEYS if has_mediators else set()) | (QK_NORM_KEYS if qk_norm else set())
        expected |= {f"blocks.{i}.{key}" for key in keys}
    check_names(expected, weights)
    return attention


def check_names(expected: Iterable[str], given: Iterable[str]) -> None:
    """Raises one `ValueError` that names the missing and the unexpected weights, if there are any."""
    missing, unexpected = set(expected) - set(given), set(given) - set(expected)
    if unexpected and not missing:
        raise ValueError(
            f"this checkpoint has all weights of the model, and others that it does not use: {listed(unexpected)}; "
            "remove those to load the rest"
        )
    if missing:
        raise ValueError(
            f"this is not such a checkpoint: missing weights: {listed(missing)}; unexpected: {listed(unexpected)}"
        )


def check_official(attention: Sequence[str], allowed: Sequence[str], steps: Sequence[object]) -> None:
    """Raises one `ValueError` that names what the official layout has no place for.

    Args:
        attention: of every layer.
        allowed: those that it has a place for.
        steps: of progressive width; one is the plain backbone.
    """
    refused = [f"{name} layers" for name in dict.fromkeys(attention) if name not in allowed]
    refused += [f"{len(steps)} steps of width"] if len(steps) > 1 else []
    if refused:
        raise ValueError(
            f"the official layout has no place for {' and '.join(refused)}, only for layers of "
            f"{', '.join(allowed)} at one width; the diffattn layout (save_pretrained) supports every model"
        )


def check_loaded(source: object, found: Mapping[str, Sequence[str]]) -> None:
    """Raises one `ValueError` that names the weights a saved model lacks, and those it should not have.

    Args:
        source: its path.
        found: the information from `output_loading_info=True`, which diffusers only logs by default.
    """
    missing, unexpected = found.get("missing_keys", ()), found.get("unexpected_keys", ())
    if missing or unexpected:
        raise ValueError(
            f"the weights of {str(source)!r} do not fit its configuration: missing: {listed(missing)}; "
            f"unexpected: {listed(unexpected)}"
        )


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names for a message, sorted: the first `most` and the number of the others; "none" without any."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _check_dimensions(weights: Weights) -> None:
    """Raises one `ValueError` that names the weights without the dimensions whose sizes are to be read."""
    wrong = [
        f"{name} {list(weight.shape)} (must have {dimensions} dimensions)"
        for end, dimensions in DIMENSIONS.items()
        for name, weight in weights.items()
        if name.endswith(end) and weight.ndim != dimensions
    ]
    if wrong:
        raise ValueError(f"weights of the wrong shape: {listed(wrong)}")


def check_finite(weights: Weights) -> None:
    """Raises one `ValueError` that names the weights with values that are NaN or infinite, if there are any."""
    bad = {name: int((~weight.isfinite()).sum()) for name, weight in weights.items() if weight.is_floating_point()}
    if wrong := [f"{name} ({n} of {weights[name].numel()} values)" for name, n in bad.items() if n]:
        raise ValueError(f"weights with values that are NaN or infinite: {listed(wrong)}")


def check_shapes(expected: Weights, given: Weights) -> None:
    """Raises one `ValueError` that names the weights of another shape, if there are any."""
    wrong = [
        f"{name} {list(given[name].shape)} (must be {list(weight.shape)})"
        for name, weight in expected.items()
        if given[name].shape != weight.shape
    ]
    if wrong:
        raise ValueError(f"weights of the wrong shape: {listed(wrong)}")


def _mediators(weights: Weights, attention: Sequence[str], num_heads: int) -> list[int]:
    """The single number of mediators of a published checkpoint, as a list; empty without mediator layers."""
    shapes = {
        tuple(weights[f"blocks.{i}.attn.an_bias"].shape[:2]) for i, kind in enumerate(attention) if kind == "mediator"
    }
    if wrong := sorted({heads for heads, _ in shapes} - {num_heads}):
        raise ValueError(f"num_heads={num_heads}, but the position biases are those of {wrong[0]} heads")
    numbers = sorted({n for _, n in shapes})
    if len(numbers) > 1:
        raise ValueError(f"the layers must have one number of mediators, got {numbers}")
    return numbers


def _grid(
    weights: Weights, attention: Sequence[str], hidden: int, patch: int, sample_size: Sequence[int] | int | None
) -> tuple[int, int]:
    """Rows and columns of the tokens: given, or those of the position biases, or a square."""
    tokens = weights["pos_embed"].shape[1]
    if sample_size is not None:
        h, w = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        grid = (h // patch, w // patch)
    elif "mediator" in attention:
        first = f"blocks.{attention.index('mediator')}.attn."
        grid = (weights[f"{first}ah_bias"].shape[3], weights[f"{first}aw_bias"].shape[4])
    else:
        grid = (isqrt(tokens), isqrt(tokens))
    expected, given = position_embedding(grid, hidden), weights["pos_embed"].detach().float().cpu()
    if expected.shape != given.shape or not torch.allclose(expected, given, atol=1e-2):  # bfloat16 is off by 4e-3
        raise ValueError(
            f"pos_embed {list(given.shape)} is not the fixed sin-cos embedding of a {grid[0]}x{grid[1]} grid "
            f"of width {hidden}; pass sample_size=(height, width) if the grid is not square"
        )
    return grid


def _learns_sigma(weights: Weights, values: int) -> bool:
    rows = weights["final_layer.linear.weight"].shape[0]
    if rows not in (values, 2 * values):
        raise ValueError(f"final_layer.linear.weight must have {values} or {2 * values} rows, got {rows}")
    return rows == 2 * values


def _classes(weights: Weights, num_classes: int | None) -> dict[str, Any]:
    rows = weights["y_embedder.embedding_table.weight"].shape[0]
    num_classes = rows - 1 if num_classes is None else num_classes
    if num_classes not in (rows, rows - 1):
        raise ValueError(
            f"the label table has {rows} rows: num_classes must be {rows - 1} (and a null class) or {rows}, "
            f"got {num_classes}"
        )
    return {"num_classes": num_classes, "null_class": num_classes == rows - 1}


def official_to_native(weights: Weights) -> dict[str, Tensor]:
    """Official names to ours."""
    native = {}
    for key, weight in weights.items():
        before, _, name = key.rpartition(".")
        if name in MEDIATOR_AXIS:
            native[f"{before}.biases.{weight.shape[MEDIATOR_AXIS[name]]}.{name}"] = weight
        elif key != "pos_embed":
            native[key] = weight
    return native

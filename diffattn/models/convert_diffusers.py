"""The layout of diffusers' `DiTTransformer2DModel`. Nothing here builds a model.

It holds the same weights as the official layout under other names, with q, k and v apart and a copy of the time and
class embedders in every block.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffattn.models.convert import LINEAR, TIME_DIRECTION, Weights

# Official module -> module of `DiTTransformer2DModel`; `attn.qkv` is split there.
DIFFUSERS_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
DIFFUSERS_EMBEDDERS = {  # each block has a copy
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
DIFFUSERS_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def _renames(depth: int) -> Iterator[tuple[str, str]]:
    """(our module, the diffusers module with the same weights)"""
    yield from DIFFUSERS_TOP.items()
    for i in range(depth):
        for ours, theirs in DIFFUSERS_EMBEDDERS.items():
            yield ours, f"transformer_blocks.{i}.{theirs}"
        for ours, theirs in DIFFUSERS_BLOCK.items():
            yield f"blocks.{i}.{ours}", f"transformer_blocks.{i}.{theirs}"


def native_to_diffusers(weights: Weights, depth: int) -> dict[str, Tensor]:
    """Our names (softmax layers only) to those of `DiTTransformer2DModel`."""
    theirs = {
        f"{their_module}.{part}": weights[f"{module}.{part}"]
        for module, their_module in _renames(depth)
        for part in LINEAR
        if f"{module}.{part}" in weights
    }
    for i in range(depth):
        for part in LINEAR:
            split = weights[f"blocks.{i}.attn.qkv.{part}"].chunk(3)
            theirs |= {f"transformer_blocks.{i}.attn1.to_{x}.{part}": w for x, w in zip("qkv", split, strict=True)}
    return theirs


def diffusers_to_native(weights: Weights, depth: int) -> dict[str, Tensor]:
    """The names of `DiTTransformer2DModel` to ours.

    Raises:
        ValueError: the blocks' copies of an embedder differ, which one embedder cannot express.
    """
    native: dict[str, Tensor] = {}
    for module, their_module in _renames(depth):
        for part in LINEAR:
            weight = weights.get(f"{their_module}.{part}")
            if weight is None:
                continue
            if not torch.equal(native.setdefault(f"{module}.{part}", weight), weight):
                raise ValueError(f"{their_module}.{part} differs from the copy in the first block")
    for i in range(depth):
        for part in LINEAR:
            split = [weights[f"transformer_blocks.{i}.attn1.to_{x}.{part}"] for x in "qkv"]
            native[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(split)
    return native


DIFFUSERS_NEEDS = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
"""Settings of `DiTTransformer2DModel` that this backbone has too; any other value is refused."""


def config_from_diffusers(theirs: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """Our configuration of a `DiTTransformer2DModel` with configuration `theirs`; see `DiT.from_diffusers`."""
    if prediction not in TIME_DIRECTION:
        raise ValueError(f"prediction must be one of {', '.join(TIME_DIRECTION)}, got {prediction!r}")
    for name, needed in DIFFUSERS_NEEDS.items():
        if theirs[name] != needed:
            raise ValueError(f"{name} must be {needed!r} to convert, got {theirs[name]!r}")
    channels, out_channels = theirs["in_channels"], theirs["out_channels"] or theirs["in_channels"]
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be {channels} or {2 * channels} to convert, got {out_channels}")
    return {
        "sample_size": theirs["sample_size"],
        "patch_size": theirs["patch_size"],
        "in_channels": channels,
        "hidden_size": theirs["num_attention_heads"] * theirs["attention_head_dim"],
        "num_layers": theirs["num_layers"],
        "num_heads": theirs["num_attention_heads"],
        "num_classes": theirs["num_embeds_ada_norm"],
        "learn_sigma": out_channels == 2 * channels,
        "prediction": prediction,
        "time_direction": TIME_DIRECTION[prediction],
        "norm_eps": theirs["norm_eps"],
        "frequency_shift": 1.0,
    }


def config_to_diffusers(
    ours: Mapping[str, Any], attention: tuple[str, ...], grid: tuple[int, int], num_steps: int = 1
) -> dict[str, Any]:
    """The arguments of the `DiTTransformer2DModel` with our configuration `ours`.

    Args:
        ours: the configuration.
        attention: the attention of every layer.
        grid: rows and columns of the tokens.
        num_steps: of progressive width; one is the plain backbone.

    Raises:
        ValueError: naming what that class does not have.
    """
    kinds = sorted(set(attention) - {"softmax"})
    refused = {
        f"{' and '.join(kinds)} layers": bool(kinds),
        f"{num_steps} steps of width": num_steps > 1,
        "qk_norm": ours["qk_norm"],
        f"mlp_ratio={ours['mlp_ratio']:g} (only 4)": ours["mlp_ratio"] != 4,
        "a label table without a null class": not ours["null_class"],
        f"a grid of {grid[0]}x{grid[1]} tokens (only squares)": grid[0] != grid[1],
    }
    if reasons := [what for what, is_so in refused.items() if is_so]:
        raise ValueError(f"DiTTransformer2DModel does not have {', '.join(reasons)}")
    channels = ours["in_channels"]
    return {
        "num_attention_heads": ours["num_heads"],
        "attention_head_dim": ours["hidden_size"] // ours["num_heads"],
        "in_channels": channels,
        "out_channels": 2 * channels if ours["learn_sigma"] else channels,
        "num_layers": ours["num_layers"],
        "sample_size": grid[0] * ours["patch_size"],
        "patch_size": ours["patch_size"],
        "num_embeds_ada_norm": ours["num_classes"],
        "norm_eps": ours["norm_eps"],
    }

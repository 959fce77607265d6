"""Spatial features, for sFID (Nash et al. 2021): the arrangement of a picture, which pooled features discard.

Shapes: B pictures of height h and width w, d pooled features, s spatial ones.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffattn.metrics.extractors import FeatureExtractor, InceptionExtractor, OfflineExtractor
from diffattn.metrics.reference import Statistics

CHANNELS = 7  # of the layer, as ADM takes them
GRID = 8  # side of the map that the offline classifiers' stage is averaged to


def spatial_layer(extractor: FeatureExtractor) -> tuple[nn.Module, int | None] | None:
    """The layer, and the side its map is averaged to; None if there is none."""
    model = extractor.model
    if isinstance(extractor, InceptionExtractor):
        return model.Mixed_6d.branch1x1, None  # type: ignore[union-attr,return-value]
    if isinstance(extractor, OfflineExtractor):
        return model.stages[3], GRID  # type: ignore[index,return-value]
    return None


def spatial_layer_name(extractor: FeatureExtractor) -> str:
    """The name of the layer in a protocol."""
    inception = isinstance(extractor, InceptionExtractor)
    return "mixed_6/conv, 7 channels" if inception else f"second stage, {CHANNELS} channels of {GRID}x{GRID}"


def both_features(extractor: FeatureExtractor, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pooled features [B, d] and spatial ones [B, s] of uint8 pictures [B, 3, h, w], on the CPU, in one pass.

    Inception gives ADM's (Dhariwal & Nichol 2021), in their order: the first 7 channels of the layer `mixed_6/conv`,
    s = 2,023. The offline classifiers give the first 7 channels of their second stage on a grid of 8x8. Others: None.

    Raises:
        ValueError: as the extractor; features that are not finite.
    """
    found, seen = spatial_layer(extractor), []
    handle = found[0].register_forward_hook(lambda module, inputs, output: seen.append(output)) if found else None
    try:
        with torch.inference_mode():
            pooled = extractor(images.to(extractor.device)).float().cpu()
    finally:
        if handle is not None:
            handle.remove()
    spatial = None
    if found is not None:
        x = seen[0][:, :CHANNELS].float()
        side = found[1]
        x = x if side is None else F.adaptive_avg_pool2d(x, side)
        spatial = x.permute(0, 2, 3, 1).flatten(1).cpu().clone()
    if not all(torch.isfinite(x).all() for x in (pooled, spatial) if x is not None):
        raise ValueError(f"extractor {extractor.name!r} gave features that are NaN or infinite")
    return pooled.clone(), spatial


def read_spatial_statistics(path: str | Path) -> Statistics | None:
    """`mu_s` and `sigma_s` of an ADM `.npz`; None if it has none, or is not such a file.

    Raises:
        ValueError: as `Statistics`; the message names the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu_s", "sigma_s"} <= set(file.files):
                return None
            mean, cov = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu_s", "sigma_s"))
    except (OSError, ValueError):
        return None
    try:
        return Statistics(mean, cov, None)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} (mu_s is the mean, sigma_s the covariance): {error}") from None

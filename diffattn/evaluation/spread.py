"""Details of a result that allow intervals of differences: values of every picture, and figures without some of them.

Both are details of a `QualityResult`, as JSON types; `diffattn.evaluation.differences` reads them.

Shapes: N pictures, G groups of them, d pooled features, s spatial ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffattn.metrics.fid import fid_without
from diffattn.metrics.intervals import LEAST
from diffattn.metrics.kid import kid_without
from diffattn.metrics.reference import Reference, Statistics

PER_PICTURE = "per_picture"
"""Detail: score -> its value for every picture, None where it is infinite or unknown; and `NUMBER`."""

NUMBER = "number"
"""The picture of each value: its index among all, counted from 0."""

WITHOUT_GROUP = "without_group"
"""Detail: score -> how much it changes when each of the groups is left out."""

GROUPS = 20  # at most


def per_picture(values: Mapping[str, Tensor], numbers: Sequence[int]) -> dict[str, list[Any]]:
    """The detail `PER_PICTURE`, from values [N] by score."""
    return {NUMBER: list(numbers)} | {name: [_rounded(x) for x in found.tolist()] for name, found in values.items()}


def without_group(
    found: Mapping[str, Tensor], reference: Reference, spatial: Statistics | None
) -> dict[str, list[float]]:
    """The detail `WITHOUT_GROUP` of FID, KID and sFID, as far as pictures and reference allow.

    Pictures at the same places of two results are in the same group: what they have in common cancels in a difference.

    Args:
        found: "pooled" [N, d] and perhaps "spatial" [N, s] of the pictures.
        reference: of the same extractor.
        spatial: moments of the reference's spatial features.
    """
    count = len(found["pooled"])
    if count < LEAST:
        return {}
    groups = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % min(GROUPS, count)
    figures: dict[str, Callable[[], Tensor]] = {"fid": lambda: fid_without(found["pooled"], reference, groups)}
    if reference.features is not None:
        figures["kid"] = lambda: kid_without(found["pooled"], reference, groups)
    if "spatial" in found and spatial is not None:
        figures["sfid"] = lambda: fid_without(found["spatial"], spatial, groups)
    changes = {}
    for name, figure in figures.items():
        values = figure()
        changes[name] = [_rounded(x) for x in (values - values.mean()).tolist()]
    return changes


def _rounded(x: float) -> float | None:
    """A value rounded to the precision of float32; None if it is not finite."""
    return float(f"{x:.7g}") if abs(x) < float("inf") else None

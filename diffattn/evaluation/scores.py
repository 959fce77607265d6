"""Computes scores of pictures in chunks kept in the run's folder, so that every step can be shared and resumed.

Shapes: N pictures in all, b in a chunk; d pooled features, s spatial ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffattn.evaluation.networks import Networks, pair_values
from diffattn.evaluation.picture_set import PictureSet, ProgressBar
from diffattn.evaluation.quality import scorers
from diffattn.evaluation.run_folder import RunFolder
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.paired import SSIM_WINDOW, foreground_psnr, mean_of_known, psnr, ssim
from diffattn.metrics.reference import Reference, Statistics
from diffattn.metrics.sfid import both_features

CHUNK = 32  # pictures in a chunk of features or of pairs

Measure = Callable[[int, int], Mapping[str, Tensor]]
"""`measure(start, stop)`: named values [b, ...] of the pictures `start` to `stop`."""


def in_chunks(run: RunFolder, kind: str, total: int, measure: Measure, progress: ProgressBar) -> dict[str, Tensor]:
    """Measure this process's share of the missing chunks, wait for the others, and gather all pictures' values."""
    shares = list(run.mine(total, CHUNK))
    with progress(kind, len(shares)) as advance:
        for number, start, stop in shares:
            if not run.chunk(kind, number).exists():
                run.write(kind, number, measure(start, stop))
            advance()
    run.among.wait()
    return run.gather(kind, total, CHUNK)


def measure_features(pictures: PictureSet, extractor: FeatureExtractor) -> Measure:
    """Values `pooled` [b, d], and `spatial` [b, s] where the extractor has them."""

    def measure(start: int, stop: int) -> dict[str, Tensor]:
        pooled, spatial = both_features(extractor, pictures.batch(start, stop))
        return {"pooled": pooled} if spatial is None else {"pooled": pooled, "spatial": spatial}

    return measure


def measure_prompts(
    pictures: PictureSet, prompts: Sequence[str], score: str, network: Callable[[Tensor, Sequence[str]], Tensor]
) -> Measure:
    """Values `score`; picture i of all, including unreadable ones, has the prompt i modulo their number."""

    def measure(start: int, stop: int) -> dict[str, Tensor]:
        words = [str(prompts[row % len(prompts)]) for row in pictures.rows[start:stop]]
        return {score: network(pictures.batch(start, stop), words)}

    return measure


def measure_pairs(pictures: PictureSet, exact: PictureSet, networks: Networks) -> Measure:
    """Values `psnr`, `foreground_psnr`, `ssim` (from 11 pixels a side), and those of the networks."""

    def measure(start: int, stop: int) -> dict[str, Tensor]:
        pair = pictures.batch(start, stop), exact.batch(start, stop)
        a, b = (x.float() / 255 for x in pair)
        found = {"psnr": psnr(a, b), "foreground_psnr": foreground_psnr(a, b)}
        if min(pictures.size) >= SSIM_WINDOW:
            found["ssim"] = ssim(a, b)
        return found | pair_values(networks, *pair)

    return measure


def set_scores(
    found: Mapping[str, Tensor], reference: Reference, spatial: Statistics | None, seed: int = 0
) -> tuple[dict[str, float], dict[str, Any], dict[str, str]]:
    """FID, and KID, FID∞, precision, recall and sFID as far as pictures and reference allow.

    Args:
        found: "pooled" [N, d] and perhaps "spatial" [N, s] of the pictures.
        reference: of the same extractor.
        spatial: moments of the reference's spatial features.
        seed: of the draws of KID and FID∞.

    Returns:
        Scores; options for their `Protocol`; metric -> why it is left out.

    Raises:
        ValueError: from `fid`.
    """
    scores, options, left_out = dict[str, float](), dict[str, Any](), dict[str, str]()
    for name, score in scorers(found["pooled"], reference, spatial=(found.get("spatial"), spatial), seed=seed).items():
        try:
            more, used = score()
        except ValueError as error:
            if name == "fid":
                raise
            left_out[name] = str(error)
        else:
            scores, options = scores | more, options | used
    return scores, options, left_out


def pair_scores(found: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, Any]]:
    """Means over the pairs, and spread and minimum for the details.

    An infinite PSNR (an identical pair) or an undefined one (no foreground) enters no mean; "pairs" counts the others.
    """
    scores, details = {}, {}
    for name, values in found.items():
        known = values.double().masked_fill(~values.isfinite(), math.nan)
        mean = mean_of_known(known)
        if mean is None:
            details[name] = {"pairs": 0}
            continue
        kept = known[~known.isnan()]
        scores[name] = mean
        details[name] = {"pairs": len(kept), "std": kept.std(correction=0).item(),
                         "min": kept.min().item(), "max": kept.max().item()}  # fmt: skip
    if "psnr" in found:
        details["identical_pairs"] = int(found["psnr"].isposinf().sum())
    return scores, details


def latent_scores(errors: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean relative error [N, steps] of the latents after the last step, and after every step.

    Empty for errors [0], of a pipeline without a callback after its steps.
    """
    if errors.ndim != 2:
        return {}, {}
    by_step = [mean_of_known(step.masked_fill(~step.isfinite(), math.nan)) for step in errors.T]
    if by_step[-1] is None:
        return {}, {}
    return {"latent_error": by_step[-1]}, {"latent_error_by_step": by_step}

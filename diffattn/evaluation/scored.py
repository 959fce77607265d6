"""One set of pictures, as far as it has been scored: against a reference, against prompts, and in pairs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffattn.evaluation.networks import Networks
from diffattn.evaluation.picture_set import PictureSet, ProgressBar
from diffattn.evaluation.references import Source
from diffattn.evaluation.run_folder import RunFolder
from diffattn.evaluation.scores import (
    in_chunks,
    latent_scores,
    measure_features,
    measure_pairs,
    measure_prompts,
    pair_scores,
    set_scores,
)
from diffattn.evaluation.spread import PER_PICTURE, WITHOUT_GROUP, per_picture, without_group
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.sfid import spatial_layer_name


class Scored:
    """What has been measured of a set so far.

    Attributes:
        scores: figures of the whole set, means included.
        values: score -> its value for every picture [N].
        details: of the result, as JSON types.
        options: of the protocol.
    """

    def __init__(self, run: RunFolder, pictures: PictureSet, progress: ProgressBar) -> None:
        self.run, self.pictures, self.progress = run, pictures, progress
        self.scores: dict[str, float] = {}
        self.values: dict[str, Tensor] = {}
        self.details: dict[str, Any] = {"pictures_hash": pictures.hash, "skipped": list(pictures.skipped)}
        self.options: dict[str, Any] = {"size": f"{pictures.size[1]}x{pictures.size[0]}"}

    def against_reference(self, source: Source, extractor: FeatureExtractor, seed: int) -> None:
        """Score the whole set: FID, and what else pictures and reference allow; `seed` is of the draws."""
        reference, spatial = source.measured(extractor, self.run, self.progress)
        measure = measure_features(self.pictures, extractor)
        features = in_chunks(self.run, "features", len(self.pictures), measure, self.progress)
        scores, options, left_out = set_scores(features, reference, spatial, seed)
        if "sfid" in scores:
            options["sfid_layer"] = spatial_layer_name(extractor)
        self.scores |= scores
        self.options |= options
        self.details |= {"left_out": left_out, "domain": extractor.domain}
        if changes := without_group(features, reference, spatial):
            self.details[WITHOUT_GROUP] = changes

    def against_prompts(self, networks: Networks, prompts: Sequence[str]) -> None:
        """Score each picture against its prompt."""
        for name, network in networks.of_prompts.items():
            measure = measure_prompts(self.pictures, prompts, name, network)
            found = in_chunks(self.run, name, len(self.pictures), measure, self.progress)
            self.scores[name] = found[name].mean().item()
            self._note(found)

    def in_pairs(self, exact: PictureSet, networks: Networks) -> None:
        """Score each picture against its partner."""
        measure = measure_pairs(self.pictures, exact, networks)
        found = in_chunks(self.run, "pairs", len(self.pictures), measure, self.progress)
        more, self.details["pairs"] = pair_scores(found)
        self.scores |= more
        self._note(found)

    def of_latents(self, errors: Tensor) -> None:
        """Relative errors [N, steps] of the latents, or [0] of a pipeline without a callback after its steps."""
        more, by_step = latent_scores(errors)
        self.scores |= more
        self.details |= by_step
        if more:
            self._note({"latent_error": errors[:, -1]})

    def _note(self, values: dict[str, Tensor]) -> None:
        self.values |= values
        self.details[PER_PICTURE] = per_picture(self.values, self.pictures.rows)

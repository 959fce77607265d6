"""References to measure against, from pictures, ADM statistics or a saved reference."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffattn.evaluation.picture_set import PictureSet, ProgressBar, no_progress, open_pictures
from diffattn.evaluation.quality import check_extractor
from diffattn.evaluation.run_folder import RunFolder
from diffattn.evaluation.scores import CHUNK, in_chunks, measure_features
from diffattn.metrics.adm import read_statistics
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.reference import Reference, Statistics
from diffattn.metrics.sfid import read_spatial_statistics

FEATURES = "features of the reference"


@dataclass(frozen=True)
class Source:
    """A reference before its features are computed. At least one of `pictures` and `stored` is not None."""

    name: str
    hash: str
    pictures: PictureSet | None
    stored: Reference | None
    spatial: Statistics | None

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the pictures that it is made from; None if unknown."""
        if self.pictures is not None:
            return self.pictures.size
        return None if self.stored is None else self.stored.size

    @property
    def count(self) -> int | None:
        """The number of pictures behind the statistics; None if unknown."""
        if self.stored is not None:
            return self.stored.statistics.count
        return None if self.pictures is None else len(self.pictures)

    def measured(
        self, extractor: FeatureExtractor, run: RunFolder, progress: ProgressBar = no_progress
    ) -> tuple[Reference, Statistics | None]:
        """The reference, with features if there are pictures, and the moments of its spatial features.

        Statistics that a file holds are preferred to those of its pictures, as in ADM's evaluation.
        """
        if self.pictures is None:
            assert self.stored is not None
            return self.stored, self.spatial
        measure = measure_features(self.pictures, extractor)
        found = in_chunks(run, FEATURES, len(self.pictures), measure, progress)
        if self.stored is not None:
            return replace(self.stored, features=found["pooled"]), self.spatial
        return _of_pictures(self.pictures, extractor, found)


def open_reference(
    source: str | Path | Reference,
    extractor: FeatureExtractor,
    *,
    side: int | None = None,
    skip_bad: bool = False,
    progress: ProgressBar = no_progress,
) -> Source:
    """Open a folder, a zip, an `.npz` with pictures, with `mu` and `sigma` or with both, or a saved reference.

    An `.npz` does not say which extractor its statistics were made with. Published ones are Inception's, so beside
    pictures they are used with that extractor only; without pictures they are used with any extractor that has as many
    features.

    Args:
        source: see above; a saved reference is what `Reference.save` wrote.
        extractor: computes the features of pictures; a saved reference must have been made with the same.
        side, skip_bad, progress: of pictures, see `PictureSet`.

    Raises:
        ValueError: none of these; a reference that was made with another extractor; see also `PictureSet`.
    """
    if isinstance(source, Reference):
        return _stored(source, extractor)
    path = Path(source)
    if path.suffix.lower() == ".safetensors":
        return _stored(Reference.load(path), extractor)
    npz = path.suffix.lower() == ".npz"
    held = _arrays(path) if npz else set()
    has_pictures, has_statistics = "arr_0" in held or not npz, {"mu", "sigma"} <= held
    pictures = None
    if has_pictures or not has_statistics:
        pictures = open_pictures(path, side=side, skip_bad=skip_bad, progress=progress)
    if not has_statistics or (pictures is not None and extractor.name != "inception"):
        assert pictures is not None
        return Source(pictures.name, pictures.hash, pictures, None, None)
    stored = read_statistics(path, extractor.name, "", extractor.resize)
    if len(stored.statistics.mean) != extractor.num_features:
        raise ValueError(f"{str(path)!r} contains statistics of {len(stored.statistics.mean)} features, and extractor "
                         f"{extractor.name!r} has {extractor.num_features}")  # fmt: skip
    return Source(stored.name, stored.hash, pictures, stored, read_spatial_statistics(path))


def make_reference(
    pictures: PictureSet, extractor: FeatureExtractor, progress: ProgressBar = no_progress
) -> tuple[Reference, Statistics | None]:
    """A reference to save, and the moments of its spatial features if the extractor has any.

    Raises:
        ValueError: features that are NaN or infinite.
    """
    measure, parts = measure_features(pictures, extractor), []
    starts = range(0, len(pictures), CHUNK)
    with progress(FEATURES, len(starts)) as advance:
        for start in starts:
            parts.append(measure(start, min(start + CHUNK, len(pictures))))
            advance()
    return _of_pictures(pictures, extractor, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _of_pictures(
    pictures: PictureSet, extractor: FeatureExtractor, found: Mapping[str, Tensor]
) -> tuple[Reference, Statistics | None]:
    """The reference made from the values of `measure_features`."""
    labels = (pictures.name, pictures.hash, extractor.name, extractor.hash, extractor.resize)
    reference = Reference(*labels, Statistics.of(found["pooled"]), found["pooled"], pictures.size)
    return reference, Statistics.of(found["spatial"]) if "spatial" in found else None


def _stored(reference: Reference, extractor: FeatureExtractor) -> Source:
    check_extractor(reference, extractor)
    return Source(reference.name, reference.hash, None, reference, None)


def _arrays(path: Path) -> set[str]:
    """Names of the arrays in an `.npz`; empty if it cannot be read, since whoever reads it next reports that."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(file.files)
    except Exception:  # damaged zips make numpy raise nearly anything
        return set()

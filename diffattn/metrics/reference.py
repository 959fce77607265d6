"""The pictures that generated ones are measured against, as features and their moments.

Shapes: N pictures, d features, H, W pixels.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffattn.files import write_whole
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.features import as_uint8, features_of

LABELS = ("name", "hash", "extractor", "extractor_hash", "resize")


def check_features(features: Tensor, least: int = 2) -> Tensor:
    """Features [N, d] in float64.

    Raises:
        ValueError: another shape, fewer than `least` pictures, or values that are NaN or infinite.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"features must be [N, d], got {list(features.shape)}")
    if len(features) < least:
        raise ValueError(f"at least {least} pictures are needed, got {len(features)}")
    if not torch.isfinite(features).all():
        raise ValueError("features hold values that are NaN or infinite")
    return features.double()


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [d] and unbiased covariance [d, d] of features, float64."""

    mean: Tensor
    cov: Tensor
    count: int | None  # N, None if unknown

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """From features [N, d].

        Raises:
            ValueError: fewer than 2 pictures, or values that are NaN or infinite.
        """
        x = check_features(features)
        return cls(x.mean(dim=0), x.T.cov().reshape(x.shape[1], x.shape[1]), len(x))


@dataclass(frozen=True, eq=False)
class Reference:
    """A set of pictures as one extractor sees it."""

    name: str  # for people: "CIFAR-10 train"
    hash: str  # sha256 of the pictures, or of the file the statistics came from
    extractor: str
    extractor_hash: str
    resize: str
    statistics: Statistics
    features: Tensor | None = None  # [N, d] float32; KID, precision and recall need it, FID does not

    @classmethod
    def of(
        cls,
        name: str,
        images: Iterable[Tensor],
        extractor: FeatureExtractor,
        batch_size: int = 128,
        on_batch: Callable[[int], None] | None = None,
    ) -> "Reference":
        """From pictures; arguments and errors as `features_of`."""
        hashed = _Hashed(images)
        features = features_of(hashed, extractor, batch_size, on_batch)
        statistics = Statistics.of(features)
        digest = hashed.digest.hexdigest()
        return cls(name, digest, extractor.name, extractor.hash, extractor.resize, statistics, features)

    def save(self, path: str | Path, features: bool = True) -> None:
        """Write a safetensors file at once; `features=False` keeps mean and covariance only."""
        tensors = {"mean": self.statistics.mean, "cov": self.statistics.cov}
        if features and self.features is not None:
            tensors["features"] = self.features
        labels = {label: getattr(self, label) for label in LABELS} | {"count": str(self.statistics.count or "")}
        whole = {key: x.contiguous() for key, x in tensors.items()}
        write_whole(Path(path), lambda part: save_file(whole, part, labels))

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """What `save` wrote.

        Raises:
            ValueError: not such a file; the message names it.
        """
        try:
            with safe_open(path, "pt") as file:
                labels = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
            count = int(labels["count"]) if labels["count"] else None
            statistics = Statistics(tensors["mean"], tensors["cov"], count)
            name, digest, *extractor = (labels[label] for label in LABELS)
            return cls(name, digest, extractor[0], extractor[1], extractor[2], statistics, tensors.get("features"))
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{str(path)!r} is not a reference saved by diffattn: {error}") from error


class _Hashed:
    """Chunks of pictures as they pass, and the sha256 of all of them, however they were cut into chunks."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.images = images
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in map(as_uint8, self.images):
            for picture in chunk.cpu():
                self.digest.update(str(tuple(picture.shape)).encode())
                self.digest.update(picture.contiguous().numpy().tobytes())
            yield chunk

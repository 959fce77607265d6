"""The pictures that generated ones are compared with, as features and their moments.

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

ASYMMETRY = 1e-5  # of the largest entry: rounding to float32 may make opposite entries of a covariance differ by this
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
        raise ValueError("features contain values that are NaN or infinite")
    return features.double()


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [d] and unbiased covariance [d, d] of features, float64.

    Raises:
        ValueError: other shapes, values that are NaN or infinite, or a covariance that is not symmetric. That it has no
            negative eigenvalues either is checked where its eigenvalues are taken, see `frechet_distance`.
    """

    mean: Tensor
    cov: Tensor
    count: int | None  # N, None if unknown

    def __post_init__(self) -> None:
        mean, cov = self.mean, self.cov
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not len(mean):
            raise ValueError(f"the mean must be [d] and the covariance [d, d], got {list(mean.shape)} and "
                             f"{list(cov.shape)}")  # fmt: skip
        for name, values in (("mean", mean), ("covariance", cov)):
            if not torch.isfinite(values).all():
                raise ValueError(f"the {name} contains values that are NaN or infinite")
        off = (cov - cov.T).abs().max().item()
        if off > ASYMMETRY * cov.abs().max().item():
            raise ValueError(f"the covariance is not symmetric: opposite entries differ by up to {off:.3g}")

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """The statistics of features [N, d].

        Raises:
            ValueError: fewer than 2 pictures, or values that are NaN or infinite.
        """
        x = check_features(features)
        return cls(x.mean(dim=0), x.T.cov().reshape(x.shape[1], x.shape[1]), len(x))


@dataclass(frozen=True, eq=False)
class Reference:
    """A set of pictures, as features of one extractor."""

    name: str  # human-readable, e.g. "CIFAR-10 train"
    hash: str  # sha256 of the pictures, or of the file the statistics came from
    extractor: str
    extractor_hash: str
    resize: str
    statistics: Statistics
    features: Tensor | None = None  # [N, d] float32; KID, precision and recall need it, FID does not
    size: tuple[int, int] | None = None  # (H, W) of the pictures; None: unknown, or of several sizes

    @classmethod
    def of(
        cls,
        name: str,
        images: Iterable[Tensor],
        extractor: FeatureExtractor,
        batch_size: int = 128,
        on_batch: Callable[[int], None] | None = None,
    ) -> "Reference":
        """The reference made of pictures; arguments and errors as `features_of`."""
        hashed = _Hashed(images)
        features = features_of(hashed, extractor, batch_size, on_batch)
        statistics = Statistics.of(features)
        digest = hashed.digest.hexdigest()
        size = next(iter(hashed.sizes)) if len(hashed.sizes) == 1 else None
        return cls(name, digest, extractor.name, extractor.hash, extractor.resize, statistics, features, size)

    def save(self, path: str | Path, features: bool = True) -> None:
        """Write a safetensors file, see `write_whole`; `features=False` keeps mean and covariance only."""
        tensors = {"mean": self.statistics.mean, "cov": self.statistics.cov}
        if features and self.features is not None:
            tensors["features"] = self.features
        labels = {label: getattr(self, label) for label in LABELS} | {"count": str(self.statistics.count or "")}
        if self.size is not None:
            labels["size"] = "{}x{}".format(*self.size)
        whole = {key: x.contiguous() for key, x in tensors.items()}
        write_whole(Path(path), lambda part: save_file(whole, part, labels))

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read a file that `save` wrote.

        Raises:
            ValueError: not a reference file, or values that are NaN or infinite; the message names it.
        """
        try:
            with safe_open(path, "pt") as file:
                labels = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
            count = int(labels["count"]) if labels["count"] else None
            statistics = Statistics(tensors["mean"], tensors["cov"], count)
            name, digest, *extractor = (labels[label] for label in LABELS)
            features = check_features(tensors["features"]).float() if "features" in tensors else None
            size = _size(labels["size"]) if "size" in labels else None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not a reference saved by diffattn: {error}") from error
        return cls(name, digest, extractor[0], extractor[1], extractor[2], statistics, features, size)


def _size(text: str) -> tuple[int, int]:
    """ "HxW" -> (H, W)"""
    height, width = map(int, text.split("x"))
    return height, width


class _Hashed:
    """Passes chunks of pictures on, and takes the sha256 of all of them, however they are cut into chunks."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.images = images
        self.digest = hashlib.sha256()
        self.sizes: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in map(as_uint8, self.images):
            for picture in chunk.cpu():
                self.sizes.add((picture.shape[1], picture.shape[2]))
                self.digest.update(str(tuple(picture.shape)).encode())
                self.digest.update(picture.contiguous().numpy().tobytes())
            yield chunk

"""The scores of a set of generated pictures, and their protocol. Only equal protocols can be compared."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import Any, Self

import torch
from torch import Tensor

from diffattn.machine import dtype_name, versions
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.fid import fid, fid_infinity, frechet_distance
from diffattn.metrics.kid import kid
from diffattn.metrics.precision_recall import precision_recall
from diffattn.metrics.reference import Reference, Statistics


@dataclass(frozen=True)
class Protocol:
    """Everything that a figure depends on, except what is being measured."""

    num_pictures: int  # N, generated
    reference: str
    reference_hash: str
    reference_pictures: int | None
    extractor: str
    extractor_hash: str
    resize: str
    sampler: str
    steps: int | None  # this and the next two are None for pictures from files
    guidance: float | None
    seeds: str | None  # "0..9999"
    dtype: str
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of metrics and drawing: subsets, size, prompts, …

    @classmethod
    def of(
        cls,
        num_pictures: int,
        reference: Reference,
        extractor: FeatureExtractor,
        *,
        sampler: str,
        steps: int | None,
        guidance: float | None,
        seeds: str | None,
        dtype: torch.dtype | str,
        device: torch.device | str,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """A protocol with the properties of reference and extractor, and the versions in use.

        Raises:
            ValueError: the reference was made with another extractor.
        """
        check_extractor(reference, extractor)
        return cls(
            num_pictures=num_pictures,
            reference=reference.name,
            reference_hash=reference.hash,
            reference_pictures=reference.statistics.count,
            extractor=extractor.name,
            extractor_hash=extractor.hash,
            resize=extractor.resize,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            seeds=seeds,
            dtype=dtype if isinstance(dtype, str) else dtype_name(dtype),
            device=str(device),
            versions=versions() | {"torchmetrics": version("torchmetrics")},
            options=dict(options or {}),
        )

    def differences(self, other: "Protocol") -> dict[str, tuple[Any, Any]]:
        """Field -> (this value, the other's), for the fields that differ."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class QualityResult:
    """Scores of one subject under one protocol."""

    subject: str  # what was measured: "mediator n=16"
    protocol: Protocol
    scores: Mapping[str, float]  # "fid", "kid", "kid_std", "precision", "recall", "fid_infinity", …
    details: Mapping[str, Any] = field(default_factory=dict)  # everything that is not a score, as JSON types

    @property
    def label(self) -> str:
        """How to quote its FID, such as "FID-10000 (cifar-classifier, CIFAR-10 train)"."""
        p = self.protocol
        return f"FID-{p.num_pictures} ({p.extractor}, {p.reference})"

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        try:
            details = dict(data.get("details", {}))
            return cls(data["subject"], Protocol(**data["protocol"]), dict(data["scores"]), details)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a quality result: {error}") from error


def compare(a: QualityResult, b: QualityResult, may_differ: Collection[str] = ()) -> dict[str, float]:
    """Scores of b minus those of a, for the scores both have.

    Args:
        may_differ: fields of the protocol that are being compared, such as ("steps",).

    Raises:
        ValueError: any other field differs; all of them are named, with both values.
    """
    unknown = set(may_differ) - {f.name for f in fields(Protocol)}
    if unknown:
        raise ValueError(f"the protocol has no {', '.join(sorted(unknown))}")
    found = {name: pair for name, pair in a.protocol.differences(b.protocol).items() if name not in may_differ}
    if found:
        named = "; ".join(text for name, pair in found.items() for text in _in_words(name, *pair))
        raise ValueError(f"{a.subject!r} and {b.subject!r} cannot be compared: their protocols differ in {named}")
    return {name: b.scores[name] - a.scores[name] for name in a.scores if name in b.scores}


def _in_words(name: str, mine: Any, theirs: Any) -> list[str]:
    """How a field differs; for a mapping, which entries do."""
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return [f"{name}: {mine!r} and {theirs!r}"]
    keys = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
    return [f"{name}.{key}: {mine.get(key)!r} and {theirs.get(key)!r}" for key in keys]


Scorer = Callable[[], tuple[dict[str, float], dict[str, Any]]]
"""Gives scores and the options they depend on; raises `ValueError` where pictures or reference do not allow it."""


def scorers(
    features: Tensor,
    reference: Reference,
    *,
    spatial: tuple[Tensor | None, Statistics | None] = (None, None),
    kid_subsets: int = 100,
    kid_subset_size: int | None = None,
    neighbours: int = 3,
    seed: int = 0,
) -> dict[str, Scorer]:
    """All scores of generated pictures against a reference, by metric; "fid" comes first.

    Args:
        features: of the generated pictures [N, d].
        reference: of the same extractor.
        spatial: features [N, s] of the generated pictures, and the moments of the reference's; None where unknown.
        kid_subsets, kid_subset_size: see `kid`.
        neighbours: see `precision_recall`.
        seed: of the draws of KID and FID∞.
    """

    def with_kid() -> tuple[dict[str, float], dict[str, Any]]:
        found = kid(features, reference, kid_subsets, kid_subset_size, seed)
        options = {"kid_subsets": found.subsets, "kid_subset_size": found.subset_size}
        return {"kid": found.mean, "kid_std": found.std}, options

    def with_precision() -> tuple[dict[str, float], dict[str, Any]]:
        precision, recall = precision_recall(features, reference, neighbours)
        return {"precision": precision, "recall": recall}, {"neighbours": neighbours}

    def with_spatial() -> tuple[dict[str, float], dict[str, Any]]:
        own, theirs = spatial
        if own is None or theirs is None:
            raise ValueError(f"the {'extractor' if own is None else 'reference'} has no spatial features")
        return {"sfid": frechet_distance(Statistics.of(own), theirs)}, {}

    return {
        "fid": lambda: ({"fid": fid(features, reference)}, {"metric_seed": seed}),
        "kid": with_kid,
        "precision": with_precision,
        "fid_infinity": lambda: ({"fid_infinity": fid_infinity(features, reference, seed=seed)}, {}),
        "sfid": with_spatial,
    }


def quality(
    features: Tensor, reference: Reference, *, infinity: bool = False, **how: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """FID, KID, precision and recall of generated pictures, and the options for their `Protocol`.

    Args:
        features: of the generated pictures [N, d].
        reference: with features, of the same extractor.
        infinity: "fid_infinity" too, which needs more than d pictures.
        **how: see `scorers`.

    Raises:
        ValueError: from the metrics.
    """
    found = scorers(features, reference, **how)
    scores, options = dict[str, float](), dict[str, Any]()
    for name in ("fid", "kid", "precision", *(["fid_infinity"] if infinity else [])):
        more, used = found[name]()
        scores, options = scores | more, options | used
    return scores, options


def check_extractor(reference: Reference, extractor: FeatureExtractor) -> None:
    """Raise `ValueError` if the reference was made with another extractor; an unknown hash is accepted."""
    if reference.extractor != extractor.name or reference.extractor_hash not in ("", extractor.hash):
        raise ValueError(
            f"reference {reference.name!r} was made with {reference.extractor!r} ({reference.extractor_hash[:12]}), "
            f"not with {extractor.name!r} ({extractor.hash[:12]})"
        )

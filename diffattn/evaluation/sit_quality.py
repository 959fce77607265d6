"""Quality of a SiT: FID, KID, precision and recall, and whether the class is right.

Picture i has the same seed and class whatever the attention, so that nothing else differs between two subjects.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.drawing.batch import NotFinite, draw_batch
from diffattn.evaluation.quality import Protocol, QualityResult, quality
from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.features import as_uint8, features_of
from diffattn.metrics.reference import Reference
from diffattn.sampling import SiTPipeline


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; picture i has the class i modulo their number, and the seed `seed` + i.

    Raises:
        ValueError: fewer than 2 pictures, or another number below 1.
    """

    samples: int = 1000
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples must be 2 or more, got {self.samples}")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


def draw_classes(
    pipe: SiTPipeline,
    drawing: Drawing,
    on_batch: Callable[[int], None] | None = None,
    chosen: range | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures [b, 3, H, W] uint8 and their classes [b], batch by batch; only those `chosen`, if it is given.

    Raises:
        NotFinite: a picture is NaN or infinite.
    """
    classes = pipe.transformer.config["num_classes"]
    settings = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
    among = range(drawing.samples) if chosen is None else chosen
    for start in range(0, len(among), drawing.batch):
        indices = among[start : start + drawing.batch]
        labels = [i % classes for i in indices]
        batch = draw_batch(pipe, labels, [drawing.seed + i for i in indices], settings)
        if not all(batch.finite):
            raise NotFinite(pipe, batch.seeds[batch.finite.index(False)])
        if on_batch is not None:
            on_batch(len(indices))
        yield as_uint8(batch.images), torch.tensor(labels)


def sit_quality(
    pipe: SiTPipeline,
    drawing: Drawing,
    reference: Reference,
    extractor: FeatureExtractor,
    subject: str,
    on_batch: Callable[[int], None] | None = None,
) -> QualityResult:
    """Scores of the pipeline in its current state, patched or not.

    If the extractor is a classifier of as many classes as the pipeline draws, "accuracy" is among them: the share of
    pictures that it recognises as the class they were drawn for.

    Raises:
        ValueError: a picture that is NaN or infinite; see `features_of`, `quality` and `Protocol.of`.
    """
    drawn = list(draw_classes(pipe, drawing, on_batch))
    features = features_of((images for images, _ in drawn), extractor)
    classes = torch.cat([y for _, y in drawn])
    scores, options = scores_of(features, classes, pipe.transformer.config["num_classes"], reference, extractor)
    protocol = Protocol.of(
        drawing.samples, reference, extractor, sampler=type(pipe.scheduler).__name__, steps=drawing.steps,
        guidance=drawing.guidance, seeds=f"{drawing.seed}..{drawing.seed + drawing.samples - 1}",
        dtype=pipe.transformer.dtype, device=pipe.transformer.device.type, options=options,
    )  # fmt: skip
    return QualityResult(subject, protocol, scores)


def scores_of(
    features: Tensor, classes: Tensor, num_classes: int, reference: Reference, extractor: FeatureExtractor
) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores of features [N, d] of pictures drawn for classes [N], and the options of the scores, see `quality`."""
    scores, options = quality(features, reference)
    model = extractor.model
    if isinstance(model, Classifier) and model.config["num_classes"] == num_classes:
        guesses = model.head(features.to(extractor.device)).argmax(1).cpu()
        scores["accuracy"] = (guesses == classes).float().mean().item()
    return scores, options

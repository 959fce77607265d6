"""Quality of a SiT for every number of mediators: FID, KID, precision and recall, and whether the class is right.

All numbers draw the same seeds and classes, so that nothing but the attention differs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.evaluation.quality import Protocol, QualityResult, quality
from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.features import features_of
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
    pipe: SiTPipeline, drawing: Drawing, on_batch: Callable[[int], None] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures [b, 3, H, W] uint8 and their classes [b], batch by batch."""
    classes = pipe.transformer.config["num_classes"]
    for start in range(0, drawing.samples, drawing.batch):
        indices = range(start, min(start + drawing.batch, drawing.samples))
        output: Any = pipe(
            [i % classes for i in indices],
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            generator=[torch.Generator().manual_seed(drawing.seed + i) for i in indices],
            output_type="pt",
        )
        if on_batch is not None:
            on_batch(len(indices))
        yield (output.images.float() * 255).round().to(torch.uint8), torch.tensor([i % classes for i in indices])


def sit_quality(
    pipe: SiTPipeline,
    drawing: Drawing,
    reference: Reference,
    extractor: FeatureExtractor,
    subject: str,
    on_batch: Callable[[int], None] | None = None,
) -> QualityResult:
    """Scores of the pipeline as it is set or patched.

    "accuracy" is among them where the extractor is a classifier of as many classes as the pipeline draws: the share
    of pictures that it takes for the class they were drawn for.

    Raises:
        ValueError: see `features_of`, `quality` and `Protocol.of`.
    """
    drawn = list(draw_classes(pipe, drawing, on_batch))
    features = features_of((images for images, _ in drawn), extractor)
    scores, options = quality(features, reference)
    classes = torch.cat([y for _, y in drawn])
    model = extractor.model
    if isinstance(model, Classifier) and model.config["num_classes"] == pipe.transformer.config["num_classes"]:
        guesses = model.head(features.to(extractor.device)).argmax(1).cpu()
        scores["accuracy"] = (guesses == classes).float().mean().item()
    protocol = Protocol.of(
        drawing.samples, reference, extractor, sampler=type(pipe.scheduler).__name__, steps=drawing.steps,
        guidance=drawing.guidance, seeds=f"{drawing.seed}..{drawing.seed + drawing.samples - 1}",
        dtype=pipe.transformer.dtype, device=pipe.transformer.device.type, options=options,
    )  # fmt: skip
    return QualityResult(subject, protocol, scores)


def quality_per_number(
    pipe: SiTPipeline,
    drawing: Drawing,
    reference: Reference,
    extractor: FeatureExtractor,
    numbers: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores by number of mediators ("n=4"), or by the attention of a model without any ("softmax").

    The model's own number is put back.
    """
    model = pipe.transformer
    before, found = model.num_mediators, {}
    try:
        for n in numbers or model.mediators or (0,):
            if n:
                model.set_num_mediators(n)
            subject = f"n={n}" if n else model.attention_label
            found[subject] = dict(sit_quality(pipe, drawing, reference, extractor, subject).scores)
    finally:
        model.num_mediators = before
    return found

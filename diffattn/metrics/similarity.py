"""CLIP-I and DINO-I: similarity of two pictures to a network, whatever their pixels (Ruiz et al. 2023, section 4.2)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from diffattn.metrics.extractors import FeatureExtractor, VisionExtractor, load_extractor, load_pretrained

DINO_EXAMPLES = "facebook/dinov2-base or facebook/dino-vits8"


class ImageSimilarity:
    """The cosine of the features of two pictures.

    Attributes:
        extractor: gives the features.
        hash: sha256 of its weights.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor, self.hash = extractor, extractor.hash

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarity of every pair [B] in -1..1 on the CPU, 1 if identical.

        Args:
            a, b: uint8 [B, 3, h, w].

        Raises:
            ValueError: another shape or dtype; a network that gives NaN or infinite values.
        """
        if len(a) != len(b):
            raise ValueError(f"pairs need as many pictures on both sides, got {len(a)} and {len(b)}")
        with torch.inference_mode():
            x, y = (self.extractor(pictures.to(self.extractor.device)).float() for pictures in (a, b))
            cosines = F.cosine_similarity(x, y)
        if not torch.isfinite(cosines).all():
            raise ValueError(
                f"the network {self.extractor.name!r} gave features that are NaN or infinite: check its weights"
            )
        return cosines.cpu().clone()


def clip_similarity(source: str | Path, device: str | torch.device = "cpu") -> ImageSimilarity:
    """CLIP-I with the image embedding of a CLIP model in a folder, or of a hub id.

    Raises:
        ValueError: no such model with safetensors weights.
    """
    return ImageSimilarity(load_extractor("clip", source, device))


def dino_similarity(source: str | Path, device: str | torch.device = "cpu") -> ImageSimilarity:
    """DINO-I with the class token of a DINO (`ViTModel`) or DINOv2 (`Dinov2Model`) in a folder, or of a hub id.

    Raises:
        ValueError: no such model with safetensors weights.
    """
    from transformers import AutoConfig  # slow to import

    try:
        kind = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"no DINO model could be loaded from {str(source)!r}: {why}; "
            f"give a folder or a hub id such as {DINO_EXAMPLES}"
        ) from error
    if kind == "dinov2":
        return ImageSimilarity(load_extractor("dinov2", source, device))
    if kind == "vit":
        return ImageSimilarity(_dino(source).to(device))
    raise ValueError(f"DINO-I needs a model of type vit or dinov2, and {str(source)!r} is {kind!r}; give a folder or "
                     f"a hub id such as {DINO_EXAMPLES}")  # fmt: skip


def _dino(source: str | Path) -> VisionExtractor:
    from transformers import ViTModel

    model: Any = load_pretrained("dino", ViTModel, source, add_pooling_layer=False)
    config = model.config
    return VisionExtractor(
        "dino", model, config.hidden_size, config.image_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    )

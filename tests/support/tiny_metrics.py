"""Random pictures and tiny networks that score them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import OfflineExtractor


def random_pictures(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """uint8 [count, 3, size, size]"""
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def tiny_extractor(side: int = 16) -> OfflineExtractor:
    """An extractor of 10 features with random weights, under the name of the embedded classifier."""
    torch.manual_seed(0)
    return OfflineExtractor("cifar-classifier", Classifier(5, side, (6, 8, 10), 8, "CIFAR-10").eval())


def fresh_inception(file: Path) -> nn.Module:
    """torch-fidelity's Inception with random weights; it needs some file of tensors to read, and ignores it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore[import-not-found]

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            """Stays at random weights."""

    torch.save({"fc.weight": torch.zeros(1)}, file)
    return Fresh("inception", ["2048"], str(file))

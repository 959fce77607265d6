"""Networks that turn pictures into features, by name. Figures from two different extractors are never comparable.

Shapes: B pictures of height h and width w, S side of the pictures inside the network, d features.
"""

import hashlib
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from diffattn.drawing.loading import embedded_folder
from diffattn.metrics.classifier import Classifier

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
DINOV2_SIDE = 224  # at which DINOv2 is evaluated; its configuration has the side of its position embedding


class FeatureExtractor(nn.Module):
    """`extractor(images)`: uint8 pictures [B, 3, h, w] of any size -> features [B, d].

    Accepted wherever torchmetrics takes a feature extractor. Frozen, and always in evaluation mode.

    Attributes:
        name: its key in `EXTRACTORS`.
        hash: sha256 of the weights.
        num_features: d.
        input_size: S.
        resize: how pictures are resized to S×S.
        domain: the only kind of pictures its features are meaningful for; None: any.
    """

    def __init__(
        self, name: str, model: nn.Module, num_features: int, input_size: int, resize: str, domain: str | None = None
    ) -> None:
        super().__init__()
        self.name, self.num_features, self.input_size = name, num_features, input_size
        self.resize, self.domain = f"{resize} to {input_size}x{input_size}", domain
        self.hash = weights_hash(model)
        self.model = model.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode, whatever the mode of the owner."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, d] of uint8 pictures [B, 3, h, w].

        Raises:
            ValueError: another shape or dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"pictures must be uint8 [B, 3, h, w], got {images.dtype} {list(images.shape)}")
        return self.embed(images)

    def embed(self, images: Tensor) -> Tensor:
        """Features [B, d] of pictures that `forward` has checked; every kind of extractor has its own."""
        raise NotImplementedError


class OfflineExtractor(FeatureExtractor):
    """The pooled features of one of the embedded classifiers."""

    def __init__(self, name: str, model: Classifier) -> None:
        config = model.config
        resize = "bilinear with antialiasing"
        super().__init__(name, model, model.num_features, config["input_size"], resize, config["domain"])

    def embed(self, images: Tensor) -> Tensor:
        return self.model.features(images.float() / 127.5 - 1)  # type: ignore[operator]


class InceptionExtractor(FeatureExtractor):
    """The 2,048 pooled features of TensorFlow's Inception v3 of published FIDs, ADM's among them (torch-fidelity)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("inception", model, 2048, 299, "bilinear of TensorFlow 1, without antialiasing,")

    def embed(self, images: Tensor) -> Tensor:
        return self.model(images)[0]


class VisionExtractor(FeatureExtractor):
    """A vision transformer of `transformers`: DINO's or DINOv2's normed class token, or CLIP's image embedding."""

    def __init__(self, name: str, model: nn.Module, num_features: int, side: int, mean: Any, std: Any) -> None:
        super().__init__(name, model, num_features, side, "bicubic with antialiasing, aspect ratio not kept,")
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def embed(self, images: Tensor) -> Tensor:
        size = (self.input_size, self.input_size)
        x = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        found = self.model((x - self.mean) / self.std)  # type: ignore[operator]
        return found.image_embeds if self.name == "clip" else found.last_hidden_state[:, 0]


def load_extractor(name: str, source: str | Path | None = None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Load an extractor by name.

    Args:
        name: "cifar-classifier" or "emoji-classifier" (shipped, each for its own kind of pictures only),
            "inception" (needs torch-fidelity), "dinov2" or "clip".
        source: where the weights are, if not in the usual place. A folder for the classifiers; a file for Inception,
            which is downloaded otherwise; a folder or hub id for DINOv2 and CLIP, by default "facebook/dinov2-base" and
            "openai/clip-vit-base-patch32".
        device: where to work.

    Raises:
        ValueError: an unknown name, or weights that are missing or cannot be read; the message says how to get them.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; choose from {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](name, source).to(device)


def weights_hash(model: nn.Module) -> str:
    """The sha256 of names, shapes and values of all weights and buffers that are saved."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _offline(name: str, source: str | Path | None) -> FeatureExtractor:
    folder = Path(source) if source is not None else embedded_folder(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"extractor {name!r} has no weights in {str(folder)!r}; "
            f"train it with: python pipelines/train_classifiers.py {name.split('-')[0]}"
        )
    try:
        model = Classifier.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"extractor {name!r} could not be loaded from {str(folder)!r}: {_first_line(error)}"
        ) from error
    return OfflineExtractor(name, model)


def _inception(name: str, source: str | Path | None) -> FeatureExtractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ValueError(
            f"extractor {name!r} needs torch-fidelity ({error}): pip install 'diffattn[inception]'; without it use one "
            f"of {', '.join(other for other in EXTRACTORS if other != name)}"
        ) from None
    weights = _inception_weights(source)
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # torch-fidelity unpickles any file that it is given, so give it a safe one
        file = Path(folder) / "weights.pth"
        torch.save(weights, file)
        try:
            return InceptionExtractor(FeatureExtractorInceptionV3(name, ["2048"], str(file)))
        except RuntimeError as error:
            raise ValueError(
                f"these are not the weights of torch-fidelity's Inception: {_first_line(error)}"
            ) from error


def _inception_weights(source: str | Path | None) -> Mapping[str, Tensor]:
    """The one download of the evaluation."""
    try:
        if source is not None:
            return read_tensors(source)
        return torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", weights_only=True)
    except Exception as error:
        what = f"downloaded: {_first_line(error)}" if source is None else f"read: {error}"
        raise ValueError(
            f"the weights of Inception could not be {what}; get {INCEPTION_URL} and give the file"
        ) from error


def read_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """Named tensors of a safetensors file, or of a `.pth` file, of which nothing but tensors is read.

    Raises:
        ValueError: not such a file, or one that holds more than tensors.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = "it contains more than tensors" if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        raise ValueError(f"{str(path)!r}: {why}") from error
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{str(path)!r} does not contain named tensors")
    return found


def _dinov2(name: str, source: str | Path | None) -> FeatureExtractor:
    from transformers import Dinov2Model  # slow to import

    model = load_pretrained(name, Dinov2Model, source or "facebook/dinov2-base")
    side = min(DINOV2_SIDE, model.config.image_size)
    return VisionExtractor(name, model, model.config.hidden_size, side, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _clip(name: str, source: str | Path | None) -> FeatureExtractor:
    from transformers import CLIPVisionModelWithProjection

    model = load_pretrained(name, CLIPVisionModelWithProjection, source or "openai/clip-vit-base-patch32")
    config = model.config
    return VisionExtractor(name, model, config.projection_dim, config.image_size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def load_pretrained(name: str, kind: Any, source: str | Path, **given: Any) -> Any:
    """A model of `transformers` in float32.

    Args:
        name: of the extractor, for the message.
        kind: its class.
        source: folder or hub id.
        **given: to its constructor.

    Raises:
        ValueError: no such model with safetensors weights, or weights are missing, which would be random.
    """
    try:
        model, found = kind.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **given
        )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
        return model
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"extractor {name!r} could not be loaded from {str(source)!r}: {_first_line(error)}; "
            f"give a folder or a hub id with safetensors weights of a {kind.__name__}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


EXTRACTORS: Mapping[str, Callable[[str, str | Path | None], FeatureExtractor]] = {
    "cifar-classifier": _offline,
    "emoji-classifier": _offline,
    "inception": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
}
"""Name -> what loads it."""

"""CLIP score: how well pictures match their prompts (Hessel et al. 2021).

torchmetrics 1.9 has it, but fails with the outputs of transformers 5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from diffattn.metrics.extractors import weights_hash

EXAMPLE = "openai/clip-vit-base-patch32"


class ClipScore:
    """A CLIP model of `transformers` with its processor; 100 · cos of picture and prompt.

    Attributes:
        name: folder or hub id.
        hash: sha256 of the weights.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", example: str = EXAMPLE) -> None:
        """Raises `ValueError` if there is no CLIP model with safetensors weights, a tokenizer and a processor.

        Args:
            source: folder or hub id.
            device: where to work.
            example: a hub id that the message names.
        """
        from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

        self.name = str(source)
        try:
            loaded: Any = CLIPModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            model, found = loaded
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
            parts: Any = CLIPImageProcessor.from_pretrained(source), CLIPTokenizer.from_pretrained(source)
            self.processor: Any = CLIPProcessor(*parts)
        except (OSError, ValueError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"no CLIP model could be loaded from {self.name!r}: {why}; give a folder or a hub id such "
                             f"as {example}") from error  # fmt: skip
        self.model = model.eval().requires_grad_(False).to(device)
        self.hash = weights_hash(self.model)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score of every picture [B] on the CPU, max(100 · cos, 0); arguments and errors as `cosines`."""
        return (100 * self.cosines(images, prompts)).clamp(min=0)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of every picture's embedding and its prompt's [B] on the CPU.

        Args:
            images: uint8 [B, 3, h, w].
            prompts: one per picture; truncated to the model's maximum length.

        Raises:
            ValueError: another number of prompts than pictures; a model that gives NaN or infinite values.
        """
        if len(images) != len(prompts):
            raise ValueError(f"there must be as many prompts as pictures, got {len(prompts)} and {len(images)}")
        most = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(prompts), images=list(images.cpu()), return_tensors="pt", padding=True, truncation=True,
            max_length=most, input_data_format="channels_first",
        )  # fmt: skip
        with torch.inference_mode():
            output = self.model(**inputs.to(self.model.device))
            cosines = F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())
        if not torch.isfinite(cosines).all():
            raise ValueError(f"the CLIP model of {self.name!r} gave values that are NaN or infinite: check its weights")
        return cosines.cpu().clone()

"""T-GATE (Zhang et al., "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models", 2024).

After a gate step the cached cross-attention replaces the text, and guidance ends; before it, self-attention is re-used
between steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from .base import Draw, LeftOut, Setting, only_unet, restored

GATE = 0.4
"""Share of the steps before the gate: the package recommends step 10 of 25."""


@contextmanager
def tgate(pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """The package's own sampling loop, its other options as they ship. It replaces `draw`.

    T-GATE computes exact attention itself and never asks a layer's processor. Here it asks where the processor is
    not diffusers' plain one, so that it can be combined with agents.
    """
    try:
        from tgate import TgateSDLoader, TgateSDXLLoader, tgate_utils
    except ImportError as error:
        raise LeftOut(f"tgate cannot be used ({error}): pip install --no-deps tgate==1.0.0 DeepCache==0.1.1") from None
    unet = only_unet(pipe, "T-GATE")
    load = TgateSDXLLoader if isinstance(pipe, StableDiffusionXLPipeline) else TgateSDLoader

    def gated(*, num_inference_steps: int, **arguments: Any) -> Any:
        gate = max(round(GATE * num_inference_steps), 1)
        return pipe.tgate(num_inference_steps=num_inference_steps, gate_step=gate, **arguments)

    own = tgate_utils.tgate_processor
    with restored(unet, "forward", "cache"):
        load(pipe)
        tgate_utils.tgate_processor = _asking(own)
        try:
            yield gated
        finally:
            tgate_utils.tgate_processor = own
            del pipe.tgate  # type: ignore[attr-defined]


def _asking(own: Any) -> Any:
    """T-GATE's processor, but self-attention that is to be computed is left to a processor that is not plain."""

    def processor(attn: Any, hidden_states: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        reused = options["sa_reuse"] and options["cache"] is not None
        is_plain = type(attn.processor) is AttnProcessor2_0  # and not ours, which is an instance of a subclass
        if is_plain or reused or options["encoder_hidden_states"] is not None:
            return own(attn, hidden_states, **options)
        out = attn.processor(attn, hidden_states, attention_mask=options["attention_mask"])
        if not options["sa_cache"]:
            return out, None
        return out, out if options["keep_shape"] else sum(out.chunk(2)) / 2  # type: ignore[return-value]

    return processor

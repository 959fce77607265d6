"""Classes of diffusers with attention that have nothing to accelerate."""

from collections.abc import Mapping

LINEAR = "no quadratic self-attention: it is linear"
AUDIO = "one-dimensional: audio"
THROUGHOUT = "KV cache, BlockMask or packed segments throughout"

NOT_COVERED: Mapping[str, str] = {
    "SanaVideoTransformer3DModel": "no quadratic self-attention: it is linear",
    "AnyFlowFARTransformer3DModel": THROUGHOUT,
    "Kandinsky6SRTransformer3DModel": THROUGHOUT,
    "SanaWMLTX2RefinerTransformer3DModel": THROUGHOUT,
    "WanAnimate2Transformer3DModel": THROUGHOUT,
    "AceStepTransformer1DModel": AUDIO,
    "AudioLDM2UNet2DConditionModel": AUDIO,
    "LongCatAudioDiTTransformer": AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": AUDIO,
    "MiniMaxMusic3Transformer1DModel": AUDIO,
    "PriorTransformer": "one-dimensional: embeddings of texts, pictures or shapes",
    "RFD4ProteinaTransformer": "one-dimensional: molecules",
    "SanaControlNetModel": LINEAR,
    "SanaTransformer2DModel": LINEAR,
    "StableAudio3DiTModel": AUDIO,
    "StableAudioDiTModel": AUDIO,
    "T5FilmDecoder": AUDIO,
    "TransformerTemporalModel": "temporal layers of a few frames",
    "UNet1DModel": "one-dimensional: audio, and the paths of robots",
    "UniDiffuserTextDecoder": "one-dimensional: text",
}
"""Class -> why nothing of it is accelerated."""

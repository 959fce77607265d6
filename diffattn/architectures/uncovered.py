"""Classes of diffusers with attention that have nothing to accelerate."""

from collections.abc import Mapping

LINEAR = "no quadratic self-attention: it is linear"
AUDIO = "one-dimensional: audio"

NOT_COVERED: Mapping[str, str] = {
    "SanaVideoTransformer3DModel": "no quadratic self-attention: it is linear",
    "MotionAdapter": "temporal layers of a few frames",
    "AnyFlowFARTransformer3DModel": "KV cache and BlockMask throughout",
    "Kandinsky6SRTransformer3DModel": "BlockMask throughout",
    "SanaWMLTX2RefinerTransformer3DModel": "KV cache throughout",
    "WanAnimate2Transformer3DModel": "KV cache and BlockMask throughout",
    "AceStepTransformer1DModel": AUDIO,
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

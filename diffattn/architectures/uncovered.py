"""Classes of diffusers with attention that have nothing to accelerate."""

from collections.abc import Mapping

NOT_COVERED: Mapping[str, str] = {
    "SanaTransformer2DModel": "no quadratic self-attention: it is linear",
    "SanaControlNetModel": "no quadratic self-attention: it is linear",
    "SanaVideoTransformer3DModel": "no quadratic self-attention: it is linear",
    "PriorTransformer": "one-dimensional: the words of a text and one embedding",
    "MotionAdapter": "temporal layers of a few frames",
    "TransformerTemporalModel": "temporal layers of a few frames",
    "AnyFlowFARTransformer3DModel": "KV cache and BlockMask throughout",
    "Kandinsky6SRTransformer3DModel": "BlockMask throughout",
    "SanaWMLTX2RefinerTransformer3DModel": "KV cache throughout",
    "WanAnimate2Transformer3DModel": "KV cache and BlockMask throughout",
}

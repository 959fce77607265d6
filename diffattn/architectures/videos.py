"""Transformers of videos, whose tokens form a grid of frames, rows and columns."""

from diffattn.architectures.transformers import TransformerFamily, video

VIDEO_FAMILIES = (
    TransformerFamily(
        ("WanTransformer3DModel", "WanVACETransformer3DModel"),
        size_of=video,
        patch=lambda config: config.patch_size,
        entry_name="patch_embedding",
        others=r"attn2$",
    ),
)

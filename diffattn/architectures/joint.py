"""Transformers whose picture and text tokens attend to each other together: SD3, Flux and their kin."""

from diffattn.architectures.transformers import Time, TransformerFamily, own_patch, packed, picture, square

JOINT_FAMILIES = (
    TransformerFamily(
        ("SD3Transformer2DModel", "SD3ControlNetModel"),
        size_of=picture,
        patch=own_patch,
        entry_name="pos_embed",
        context="last",
        rotated=False,
    ),
    TransformerFamily(
        ("FluxTransformer2DModel", "FluxControlNetModel"),
        size_of=packed,
        patch=square(2),
        entry_name="x_embedder",
        context="first",
        time=Time(scale=1000),
    ),
)

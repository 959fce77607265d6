"""Features of many pictures, batch by batch.

Shapes: b, B pictures of height h and width w in a chunk and in a batch, N pictures in all, d features.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from diffattn.metrics.extractors import FeatureExtractor


def features_of(
    images: Iterable[Tensor],
    extractor: FeatureExtractor,
    batch_size: int = 128,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Features of all pictures, in their order.

    Args:
        images: chunks [b, 3, h, w] of any length and size, uint8, or floating point in 0..1 (then rounded).
        extractor: see `load_extractor`; works on the device its weights are on.
        batch_size: pictures per call of the extractor; chunks of one size are joined or cut to it.
        on_batch: called after every batch with the number of its pictures.

    Returns:
        [N, d] float32 on the CPU.

    Raises:
        ValueError: no pictures at all, a batch size below 1, chunks that `as_uint8` refuses, or features that are not
            finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    found = []
    for batch in _batches(images, batch_size):
        with torch.inference_mode():
            found.append(extractor(batch.to(extractor.device)).float().cpu())
        if not torch.isfinite(found[-1]).all():
            raise ValueError(f"extractor {extractor.name!r} gave features that are NaN or infinite")
        if on_batch is not None:
            on_batch(len(batch))
    if not found:
        raise ValueError("there are no pictures to take features of")
    return torch.cat(found).clone()  # an ordinary tensor again


def as_uint8(images: Tensor) -> Tensor:
    """Pictures [b, 3, h, w] as uint8; floating point in 0..1 is rounded to the nearest of the 256 levels.

    Raises:
        ValueError: another shape or dtype, values that are NaN, infinite or outside 0..1.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"pictures must be [b, 3, h, w], got {list(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"pictures must be uint8 or floating point in 0..1, got {images.dtype}")
    if not torch.isfinite(images).all():
        raise ValueError("pictures contain values that are NaN or infinite")
    if images.numel() and (images.min() < 0 or images.max() > 1):
        raise ValueError(f"pictures must be in 0..1, got {images.min().item():.3g} to {images.max().item():.3g}")
    return (images.float() * 255).round().to(torch.uint8)


def _batches(chunks: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """The same pictures in the same order, `batch_size` at a time as long as the size of pictures stays the same."""
    held: Tensor | None = None
    for chunk in map(as_uint8, chunks):
        if held is not None and held.shape[1:] != chunk.shape[1:]:
            yield held
            held = None
        held = chunk if held is None else torch.cat((held, chunk))
        while len(held) > batch_size:
            yield held[:batch_size]
            held = held[batch_size:]
        if not len(held):
            held = None
    if held is not None:
        yield held

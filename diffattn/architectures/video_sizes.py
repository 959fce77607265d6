"""The sizes of videos, read from the arguments of a transformer's forward: one function per layout of tokens."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from diffattn.architectures.base import Size
from diffattn.architectures.transformers import SizeOf, read_once, text_tokens, video
from diffattn.methods.base import Grid


def frames_first(model: Any, given: Mapping[str, Any]) -> Size:
    """Latents [B, f, C, h, w]."""
    _, frames, _, height, width = given["hidden_states"].shape
    return Size(height, width, frames, num_context=text_tokens(given))


def channels_last(model: Any, given: Mapping[str, Any]) -> Size:
    """Latents [B, f, h, w, C]."""
    _, frames, height, width, _ = given["hidden_states"].shape
    return Size(height, width, frames)


def with_several_texts(model: Any, given: Mapping[str, Any]) -> Size:
    """Latents [B, C, f, h, w] with tokens of one or two texts and perhaps of a picture."""
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_t5", "image_embeds")
    return video(model, given)._replace(num_context=sum(text_tokens(given, name) for name in names))


def with_history(patches: Mapping[str, int], texts: Sequence[str] = ()) -> SizeOf:
    """Latents [B, C, f, h, w] with earlier ones before them, which are coarser the farther back they are.

    Args:
        patches: argument of forward -> how much coarser it is than the latents, in the order of the tokens.
        texts: arguments of forward whose tokens are in the sequence.
    """

    def size_of(model: Any, given: Mapping[str, Any]) -> Size:
        references = []
        for name, factor in patches.items():
            if given.get(name) is not None:
                patch = (factor, 2 * factor, 2 * factor)
                pixels = given[name].shape[-3:]
                references.append(tuple(-(-p // q) for p, q in zip(pixels, patch, strict=True)))
        context = sum(text_tokens(given, name) for name in texts)
        return video(model, given)._replace(references=tuple(references), num_context=context)

    return size_of


def video_tokens(model: Any, given: Mapping[str, Any]) -> Size:
    """Tokens [B, N, C] with the frames, rows and columns of the video, or coordinates [B, 3, N] or [B, 3, N, 2].

    Additional frames, such as keyframes, count as the video's own.
    """
    tokens, config = given["hidden_states"].shape[1], model.config
    frames, height, width = (given.get(name) for name in ("num_frames", "height", "width"))
    if height is None or width is None:
        height, width = (config.patch_size * n for n in read_once(given["video_coords"], _rows_and_columns))
    each = (height // config.patch_size) * (width // config.patch_size)
    if tokens % each == 0:
        frames = tokens // each * config.patch_size_t
    return Size(height, width, frames)


def _rows_and_columns(coordinates: Tensor) -> Grid:
    """Rows and columns of video tokens with these coordinates."""
    places = coordinates[0, 1:].flatten(2)[..., 0] if coordinates.ndim == 4 else coordinates[0, 1:]
    return tuple(len(axis.unique()) for axis in places.cpu())


def vision_of_text(model: Any, given: Mapping[str, Any]) -> Size:
    """A text of `und_len` tokens and videos that see it, with their grids in `vision_token_shapes`."""
    patch = model.config.latent_patch_size
    (frames, height, width), *references = (tuple(shape) for shape in given["vision_token_shapes"])
    return Size(patch * height, patch * width, frames, tuple(references), given["und_len"])


def packed_video(model: Any, given: Mapping[str, Any]) -> Size:
    """A sequence that ends with a video, with coordinates [N, 3]: time, row and column."""
    ids, video_indices = given["position_ids"], given["video_indices"]
    grid = read_once(ids, lambda ids: _last_frames(ids.cpu(), video_indices.cpu()))
    frames, height, width = (p * n for p, n in zip(model.config.patch_size, grid, strict=True))
    return Size(height, width, frames, num_context=ids.shape[0] - prod(grid))


def _last_frames(ids: Tensor, video_indices: Tensor) -> Grid:
    """The grid of the frames at the end of a sequence, all as large as the last one."""
    gaps = (video_indices[1:] != video_indices[:-1] + 1).nonzero().flatten()
    start = int(video_indices[int(gaps[-1]) + 1]) if len(gaps) else int(video_indices[0])
    times, sizes = ids[start:, 0].unique_consecutive(return_counts=True)
    size, frames = int(sizes[-1]), 1
    while frames < len(times) and int(sizes[-1 - frames]) == size:
        frames += 1
    height = len(ids[-size:, 1].unique())
    return (frames, height, size // height)

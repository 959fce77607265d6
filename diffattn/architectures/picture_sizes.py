"""The sizes of pictures, read from the arguments of a transformer's forward: one function per layout of tokens."""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from diffattn.architectures.base import Size
from diffattn.architectures.transformers import grids_of, picture, read_once, text_tokens

DIFFERENT = "pictures of different sizes in one batch"


def without_text(model: Any, given: Mapping[str, Any]) -> Size:
    """Latents [B, C, h, w] whose text has layers of its own."""
    height, width = given["hidden_states"].shape[-2:]
    return Size(height, width)


def behind_each_text(model: Any, given: Mapping[str, Any]) -> Size:
    """Lumina 2: latents [B, C, h, w] whose tokens follow those of the text that the mask [B, c] keeps."""
    mask = given["encoder_attention_mask"]
    contexts = read_once(mask, lambda _: tuple(int(n) for n in mask.sum(dim=1).tolist()))
    height, width = given["hidden_states"].shape[-2:]
    return Size(height, width, num_context=max(contexts), contexts=contexts if len(set(contexts)) > 1 else None)


def lengths_of(model: Any, mask: Tensor | None) -> tuple[int, ...] | None:
    """Lengths of texts by their mask [B, c]; None without padding, or where padding does not follow the text."""

    def read(mask: Tensor) -> tuple[int, ...] | None:
        kept = mask.bool().cpu()
        lengths = tuple(int(n) for n in kept.sum(dim=1))
        follows = all(row[:n].all() for row, n in zip(kept, lengths, strict=True))
        return lengths if follows and min(lengths) < kept.shape[1] else None

    return None if mask is None else read_once(mask, lambda _: read(mask))


PADDED_TO = 32
"""Z-Image pads the tokens of pictures and texts to a multiple of this."""


def padded(model: Any, given: Mapping[str, Any]) -> Size:
    """Z-Image: a list of latents [C, f, h, w], and one of texts [c, C]."""
    pictures, texts = given["x"], given["cap_feats"]
    own, own_frames = model.config.all_patch_size[0], model.config.all_f_patch_size[0]
    patch, frame_patch = given.get("patch_size", own), given.get("f_patch_size", own_frames)
    if not isinstance(pictures[0], Tensor):
        *_, last = pictures[0]
        several = "several pictures between texts: tokens off the picture's grid are on both sides of it"
        return Size(last.shape[-2], last.shape[-1], last.shape[-3], exact=several)
    frames, height, width = pictures[0].shape[-3:]
    tokens = [n // p for n, p in zip((frames, height, width), (frame_patch, patch, patch), strict=True)]
    padding = -prod(tokens) % PADDED_TO
    contexts = tuple(padding + len(text) + -len(text) % PADDED_TO for text in texts)
    return Size(
        tokens[1] * own,
        tokens[2] * own,
        tokens[0] * own_frames,
        num_context=max(contexts),
        contexts=contexts if len(set(contexts)) > 1 else None,
        exact=None if all(x.shape == pictures[0].shape for x in pictures) else DIFFERENT,
    )


def with_three_texts(model: Any, given: Mapping[str, Any]) -> Size:
    """HiDream: latents [B, C, h, w] or tokens [B, N, C], padded unless square; T5's text and twice Llama's."""
    x, patch = given["hidden_states"], model.config.patch_size
    context = given["encoder_hidden_states_t5"].shape[-2] + 2 * given["encoder_hidden_states_llama3"].shape[-2]
    if x.ndim == 4:
        height, width = x.shape[-2:]
        padding = 0 if height == width else model.max_seq - (height // patch) * (width // patch)
        return Size(height, width, num_context=context + padding)
    sizes = given["img_sizes"]
    read = lambda: [tuple(int(n) for n in size) for size in sizes]  # noqa: E731
    grids = read_once(sizes, lambda _: read()) if isinstance(sizes, Tensor) else read()
    (rows, columns), exact = grids[0], None if len(set(grids)) == 1 else DIFFERENT
    return Size(patch * rows, patch * columns, num_context=context + x.shape[1] - rows * columns, exact=exact)


def with_two_texts(model: Any, given: Mapping[str, Any]) -> Size:
    """HunyuanImage: latents [B, C, h, w] or [B, C, 1, h, w], and two texts."""
    *frames, height, width = given["hidden_states"].shape[2:]
    context = text_tokens(given) + text_tokens(given, "encoder_hidden_states_2")
    size = Size(height, width, frames[0] if frames else None, num_context=context)
    mask = given["encoder_attention_mask"]
    if model.context_embedder_2 is None or given.get("encoder_hidden_states_2") is None:
        return _without_padding(size, lengths_of(model, mask))
    masks = (mask, given["encoder_attention_mask_2"])
    counts = [read_once(m, lambda x: x.bool().sum(dim=1).tolist()) for m in masks]
    return _without_padding(size, tuple(map(sum, zip(*counts, strict=True))))  # all padding is moved to the end


def _without_padding(size: Size, contexts: tuple[int, ...] | None) -> Size:
    if contexts is None or min(contexts) == size.num_context:
        return size
    return size._replace(num_context=max(contexts), contexts=contexts)


def placed_behind_text(model: Any, given: Mapping[str, Any]) -> Size:
    """Krea 2: tokens [B, N, C] with positions in `position_ids` [c + N, 3], after those of the text."""
    ids, context = given["position_ids"], given["encoder_hidden_states"].shape[1]
    (rows, columns), *others = read_once(ids, lambda _: grids_of(ids, context))
    references = tuple(others)
    return Size(2 * rows, 2 * columns, references=references, num_context=context)


OUTPUT_IMAGE, PADDING = 2, -1
"""Ideogram 4's `indicator` of tokens of the picture, and `segment_ids` of padding."""


def packed_behind_text(model: Any, given: Mapping[str, Any]) -> Size:
    """Ideogram 4: tokens [B, c + N, C], padding and text first, the picture last."""
    ids = given["position_ids"]

    def read() -> tuple[int, int, int, str | None]:
        is_picture = (given["indicator"] == OUTPUT_IMAGE).cpu()
        segments = given["segment_ids"].cpu()
        start = int((~is_picture[0]).sum())
        rows, columns = grids_of(ids, start)[0]
        in_place = is_picture[:, start:].all() and not is_picture[:, :start].any()
        is_one = (segments[:, start:] == segments[:, -1:]).all() and set(segments.unique().tolist()) <= {
            PADDING,
            int(segments[0, -1]),
        }
        return rows, columns, start, None if in_place and is_one else "packed segments"

    rows, columns, start, exact = read_once(ids, lambda _: read())
    return Size(2 * rows, 2 * columns, num_context=start, exact=exact)


def before_text(model: Any, given: Mapping[str, Any]) -> Size:
    """Ernie: latents [B, C, h, w], before texts [B, c, C] of `text_lens` tokens."""
    (height, width), lengths = given["hidden_states"].shape[-2:], given["text_lens"]
    size = Size(height, width, num_context=text_tokens(given, "text_bth"))
    return _without_padding(size, read_once(lengths, lambda _: tuple(int(n) for n in lengths.tolist())))


def with_cache(model: Any, given: Mapping[str, Any]) -> Size:
    """GLM-Image: latents [B, C, h, w], whose layers keep or use the keys of other pictures while editing."""
    caches = given.get("kv_caches")
    used = caches is not None and any(cache.mode in ("write", "read") for cache in caches.caches)
    return picture(model, given)._replace(exact="keys of other pictures from a KV cache" if used else None)


def behind_prompt(model: Any, given: Mapping[str, Any]) -> Size:
    """OmniGen: latents [B, C, h, w], after a prompt of words and pictures and a time token."""
    height, width = given["hidden_states"].shape[-2:]
    prompt = given.get("input_ids")
    return Size(height, width, num_context=1 + (0 if prompt is None else prompt.shape[1]))


def with_other_items(model: Any, given: Mapping[str, Any]) -> Size:
    """JoyImage Edit: latents [B, C, f, h, w], or items [B, n, C, f, h, w] of which the last is drawn."""
    x = given["hidden_states"]
    frames, height, width = x.shape[-3:]
    patch = model.config.patch_size
    item = tuple(n // p for n, p in zip((frames, height, width), patch, strict=True))
    references = (item,) * (x.shape[1] - 1 if x.ndim == 6 else 0)
    return Size(height, width, frames, references=references, num_context=text_tokens(given))


def with_other_pictures(model: Any, given: Mapping[str, Any]) -> Size:
    """JoyImage Edit Plus: patches [B, N, C, pf, ph, pw] of the pictures in `shape_list`, the drawn one first."""
    shapes, x = given["shape_list"], given["hidden_states"]
    (frames, rows, columns), *others = (tuple(int(n) for n in shape) for shape in shapes[0])
    references = tuple(others)
    padding = x.shape[1] - frames * rows * columns - sum(map(prod, references))
    pixels = [n * p for n, p in zip((frames, rows, columns), model.config.patch_size, strict=True)]
    size = Size(
        pixels[1],
        pixels[2],
        pixels[0],
        references=references,
        num_context=padding + text_tokens(given),
        exact=None if all(list(shape) == list(shapes[0]) for shape in shapes) else DIFFERENT,
    )
    return size if padding else _without_padding(size, lengths_of(model, given.get("encoder_hidden_states_mask")))


def with_clip(model: Any, given: Mapping[str, Any]) -> Size:
    """UniDiffuser: latents [B, C, h, w], after two times, perhaps the type of data, a text and an embedding."""
    height, width = given["latent_image_embeds"].shape[-2:]
    others = 2 + bool(model.config.use_data_type_embedding) + given["image_embeds"].shape[1]
    return Size(height, width, num_context=others + text_tokens(given, "prompt_embeds"))


def shaped(model: Any, given: Mapping[str, Any]) -> Size:
    """NucleusMoE-Image: tokens [B, N, C] of the pictures in `img_shapes`."""
    shapes = given["img_shapes"]
    first = shapes[0] if isinstance(shapes, list) else shapes
    (frames, rows, columns), *others = first if isinstance(first, list) else [first]
    references = tuple(tuple(shape) for shape in others)
    size = Size(2 * rows, 2 * columns, frames, references=references, num_context=text_tokens(given))
    return _without_padding(size, lengths_of(model, given.get("encoder_hidden_states_mask")))

"""A family of diffusers' transformers as a row of facts: where its tokens are, and what its time means."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from diffattn.architectures import plain_attention as attention
from diffattn.architectures.base import Replaced, Size
from diffattn.architectures.plug import reason_unplugged
from diffattn.methods.base import Grid, LayerSpec
from diffattn.noise_level import NUM_TRAIN_TIMESTEPS, Convention, Reading, TimeReader, rounding_of, values_of

T = TypeVar("T")

SizeOf = Callable[[Any, Mapping[str, Any]], Size]
"""(denoiser, arguments of its forward) -> the size of its latents."""

Patch = Callable[[Any], Sequence[int]]
"""The denoiser's configuration -> latent pixels per token: rows and columns, or frames, rows and columns."""


@dataclass(frozen=True)
class Time:
    """What a denoiser's time argument t means, as the time step of a scheduler, 1000 noise ... 0 data:
    `scale`·t + `offset`, or counted from the other end."""

    scale: float = 1.0
    offset: float = 0.0
    from_data: bool = False  # t rises from noise to data

    def timesteps(self, time: Tensor | float) -> Tensor | float:
        """The scheduler's time steps of t, one number or [B]; t itself where it is one."""
        if self == Time():
            return time
        values = [v * self.scale + self.offset for v in values_of(time)]
        if self.from_data:
            values = [NUM_TRAIN_TIMESTEPS - v for v in values]
        return values[0] if len(values) == 1 else torch.tensor(values, dtype=torch.float64)


FLOW = Convention(lambda t: min(max(t / NUM_TRAIN_TIMESTEPS, 0.0), 1.0), lambda t: 0 <= t <= NUM_TRAIN_TIMESTEPS)
"""Flow matching's time steps where no scheduler is known: 1000σ."""

RISING_FLOW = Convention(lambda t: 1 - FLOW.level(t), FLOW.covers)
"""The same of a scheduler with `invert_sigmas`: 1000(1 - σ)."""


TEMPORAL = "temporal layer of a few frames"
CONTEXT_PARALLEL = "context parallel: its tokens are split between processes"


@dataclass(frozen=True)
class TransformerFamily:
    """Transformers of diffusers that differ in nothing that matters to attention.

    Everything within a layer (projections, norms, rotations, gates, masks) stays the code of its processor; see `plug`.
    """

    classes: tuple[str, ...]  # names in diffusers
    size_of: SizeOf
    patch: Patch
    entry_name: str  # the submodule that every forward runs before any attention
    context: Literal["none", "first", "last"] = "none"  # where text and other tokens without a place stand
    keys_only: bool = False  # whether those tokens have keys and values, but no queries
    rotated: bool = True  # whether queries and keys carry their place as a rotation
    time: Time = Time()
    training: Convention | None = FLOW  # the meaning of time steps where no scheduler is known
    references_first: bool = False  # whether the tokens of references stand before the picture's
    temporal: str = r"$^"  # layers over the frames of one place: a pattern of names
    outer_mask: bool = False  # whether in a mask [N, N] all queries of the picture have the same row
    marks_cross_attention: bool = True  # whether the `is_cross_attention` of its layers is true
    others: str = r"$^"  # layers whose queries are not the picture's, or whose keys are another's: a pattern of names
    sample_name: str = "hidden_states"
    time_name: str = "timestep"
    time_of: Callable[[Mapping[str, Any]], Any] | None = None  # the time argument, where it is not simply `time_name`

    @property
    def title(self) -> str:
        return ", ".join(self.classes)

    def matches(self, model: nn.Module) -> bool:
        kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("diffusers.")]
        return any(name in self.classes for name in kinds)

    def layers(self, model: nn.Module) -> Iterator[tuple[LayerSpec, nn.Module]]:
        for name, module in model.named_modules():
            if getattr(module, "processor", None) is not None:
                yield self._spec(name, module), module

    def _spec(self, name: str, module: Any) -> LayerSpec:
        spec = attention.spec_of(name, module, level=0)
        is_cross = self.marks_cross_attention and bool(getattr(module, "is_cross_attention", False))
        return replace(
            spec,
            is_cross_attention=is_cross or re.search(self.others, name) is not None,
            exact=TEMPORAL if re.search(self.temporal, name) else None,
            context=self.context,
            rotated=self.rotated,
            references_first=self.references_first,
            keys_only=self.keys_only,
        )

    def reason_exact(self, module: nn.Module) -> str | None:
        return reason_unplugged(module.processor)

    def entry(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.entry_name)

    def sample(self, given: Mapping[str, Any]) -> Tensor:
        found = given[self.sample_name]
        if isinstance(found, Tensor):
            return found
        found = [x if isinstance(x, Tensor) else x[-1] for x in found]  # of several, the last is drawn
        same = all(x.shape == found[0].shape for x in found)  # a list of pictures, perhaps of different sizes
        return torch.stack(list(found)) if same else torch.cat([x.flatten() for x in found])[None]

    def timestep(self, given: Mapping[str, Any]) -> Any:
        return self.time_of(given) if self.time_of is not None else given.get(self.time_name)

    def size(self, model: nn.Module, given: Mapping[str, Any]) -> Size:
        size = self.size_of(model, given)
        if _is_context_parallel(model):
            size = size._replace(exact=CONTEXT_PARALLEL)
        return size._replace(same_mask=True) if self.outer_mask else size

    def grids(self, model: Any, height: int, width: int, frames: int | None = None) -> list[Grid]:
        patch = tuple(self.patch(model.config))
        pixels = (height, width) if len(patch) == 2 else (frames or 1, height, width)
        return [tuple(-(-p // q) for p, q in zip(pixels, patch, strict=True))]

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        if isinstance(time, Tensor) and time.ndim > 1:  # one per token or frame, lower for those that are given
            time = time.flatten(1).amax(1)
        return levels.read(self.time.timesteps(time), self.training, rounding_of(time))

    def replaced(self, **parts: Any) -> Replaced:
        return attention.replaced(**parts)


def _is_context_parallel(model: Any) -> bool:
    """Whether `enable_parallelism` splits the tokens of this denoiser between processes."""
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None) is not None


def text_tokens(given: Mapping[str, Any], name: str = "encoder_hidden_states") -> int:
    """Tokens of the text [B, c, C] among the arguments of forward, 0 without one."""
    text = given.get(name)
    return text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0


def picture(model: Any, given: Mapping[str, Any]) -> Size:
    """The size of latents [B, C, h, w]."""
    height, width = given["hidden_states"].shape[-2:]
    return Size(height, width, num_context=text_tokens(given))


def video(model: Any, given: Mapping[str, Any]) -> Size:
    """The size of latents [B, C, f, h, w]."""
    frames, height, width = given["hidden_states"].shape[-3:]
    return Size(height, width, frames, num_context=text_tokens(given))


def packed(model: Any, given: Mapping[str, Any]) -> Size:
    """The size of tokens [B, N, C] with `img_ids` [N, 3 or 4] or [B, N, 3 or 4]: picture, row, column, perhaps more;
    later pictures are references."""
    grid, *references = read_once(given["img_ids"], grids_of)
    return Size(2 * grid[0], 2 * grid[1], references=tuple(references), num_context=text_tokens(given))


def square(patch: int) -> Patch:
    """The same number of latent pixels in both directions, whatever the configuration."""
    return lambda config: (patch, patch)


def own_patch(config: Any) -> Sequence[int]:
    """Squares of the configuration's `patch_size`."""
    return (config.patch_size, config.patch_size)


_READ: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()
"""Results of `read_once`, with the tensor's version, by tensor: a run passes the same ones in every step."""


def read_once(tensor: Tensor, read: Callable[[Tensor], Any]) -> Any:
    """`read(tensor)`, remembered from the first call with this tensor until it is changed in place."""
    version = 0 if tensor.is_inference() else tensor._version
    found = _READ.get(tensor)
    if found is None or found[0] != version:
        _READ[tensor] = found = (version, read(tensor))
    return found[1]


def grids_of(ids: Tensor, first: int = 0) -> list[Grid]:
    """Rows and columns of every picture whose positions are in `ids` [N, 3 or more] or [B, N, 3 or more], from row
    `first` on."""
    rows = ids if ids.ndim == 2 else ids[0]
    places = rows[first:, :3].cpu()
    grids = []
    starts = [0, *((places[1:, 0] != places[:-1, 0]).nonzero().flatten() + 1).tolist(), len(places)]
    for start, end in pairwise(starts):
        low, high = places[start:end, 1:].amin(0), places[start:end, 1:].amax(0)
        height, width = (int(n) for n in (high - low + 1).tolist())
        grids.append((height, width) if height * width == end - start else (end - start, 1))
    return grids

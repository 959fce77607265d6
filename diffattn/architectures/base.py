"""The interface of an architecture."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from diffattn.architectures.processor import MethodProcessor
from diffattn.methods.base import Grid, LayerSpec
from diffattn.noise_level import Reading, TimeReader


class Size(NamedTuple):
    """What a denoiser call works on, in its latents' pixels."""

    height: int
    width: int
    frames: int | None = None  # of a video's latents
    references: tuple[Grid, ...] = ()  # tokens of reference pictures beside the picture's, at every level
    num_context: int = 0  # tokens of text beside the picture's, as far as known before the call
    context_first: bool | None = None  # whether they precede the picture's; None: wherever the layer has them
    same_mask: bool = False  # whether a mask with a row per query has the same row for all queries of the picture
    contexts: tuple[int, ...] | None = None  # of each sample, where they differ; padding follows all of its tokens
    exact: str | None = None  # why no layer can be accelerated in this call


class Architecture(Protocol):
    """How to access the parts of one family of denoisers. One file per family."""

    @property
    def title(self) -> str:
        """The supported classes, as listed in error messages."""
        ...

    @property
    def sample_name(self) -> str:
        """The name of the noisy input of `forward`."""
        ...

    @property
    def time_name(self) -> str:
        """Name of the time step of `forward`."""
        ...

    def matches(self, model: nn.Module) -> bool:
        """Whether this family covers the model."""
        ...

    def layers(self, model: nn.Module) -> Iterable[tuple[LayerSpec, nn.Module]]:
        """Every attention layer, with the module that has `set_processor`."""
        ...

    def reason_exact(self, module: nn.Module) -> str | None:
        """Why a layer must keep its processor, or None."""
        ...

    def entry(self, model: nn.Module) -> nn.Module:
        """A submodule that every forward runs before any attention, and that gradient checkpointing does not repeat."""
        ...

    def sample(self, given: Mapping[str, Any]) -> Tensor:
        """The noisy input [B, ...] among the arguments of `forward`."""
        ...

    def timestep(self, given: Mapping[str, Any]) -> Any:
        """The time step among the arguments of `forward`."""
        ...

    def size(self, model: nn.Module, given: Mapping[str, Any]) -> Size:
        """The size of the latents among the arguments of `forward`."""
        ...

    def grids(self, model: nn.Module, height: int, width: int, frames: int | None = None) -> Sequence[Grid]:
        """The tokens at every level, for latents of this size: rows and columns, or frames, rows and columns."""
        ...

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        """The noise level of a time step passed to the model; `levels` knows the scheduler in use."""
        ...

    def replaced(self, **parts: Any) -> "Replaced":
        """What replaces one layer's attention, built from the arguments of `MethodProcessor`."""
        ...


class Replaced(NamedTuple):
    """One layer's attention, replaced."""

    runs: MethodProcessor  # what runs the method
    processor: Any  # what the layer is given for it, perhaps the same object

"""The accelerations of a diffusers pipeline that `compare_peers.py` compares; one file per kind.

A variant is named by its parts, joined by "+", such as "tome-0.5" or "agent+deepcache-3". `apply` changes a pipeline
for the length of a `with` block.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from diffattn.benchmarks.variants import PRESETS

from .agents import agent, recipe
from .base import Draw, LeftOut, Peer, Setting
from .caching import block_cache
from .deepcache import deepcache
from .downsampling import SHRINK, downsampling
from .floor import floor
from .gating import tgate
from .sada import sada
from .steps import fewer_steps
from .tiles import tiled
from .tome import tome

__all__ = ["FLOOR", "SDPA", "VARIANTS", "LeftOut", "Setting", "apply", "check_names", "family"]

SDPA, FLOOR = "sdpa", "floor"


def _one_of(names: Iterable[str], name: str) -> str:
    if name not in names:
        raise ValueError(f"{name!r} is none of {', '.join(names)}")
    return name


KINDS: Mapping[str, Callable[[str], Peer]] = {
    SDPA: lambda _: _unchanged,
    FLOOR: lambda _: floor,
    "agent": lambda preset: partial(agent, _one_of(PRESETS, preset or "balanced")),
    "recipe": lambda path: partial(recipe, path),
    "steps": lambda number: partial(fewer_steps, int(number)),
    "tome": lambda ratio: partial(tome, float(ratio)),
    "keys": lambda kind: partial(downsampling, _one_of(SHRINK, kind)),
    "tiles": lambda number: partial(tiled, int(number)),
    "deepcache": lambda interval: partial(deepcache, int(interval)),
    "cachedit": lambda threshold: partial(block_cache, float(threshold)),
    "tgate": lambda _: tgate,
    "sada": lambda _: sada,
}
"""First part of a name -> from the rest of it to the peer."""

VARIANTS = (
    SDPA, "steps-17", "steps-14", "steps-10", "agent", "agent-fast", "agent-pooled", "agent-paper",
    "tome-0.25", "tome-0.5", "tome-0.75", "keys-sampled", "keys-pooled", "tiles-2",
    "deepcache-2", "deepcache-3", "deepcache-5", "tgate", "sada",
    "agent+deepcache-3", "agent+tgate", "agent+sada", "agent+steps-14",
)  # fmt: skip
"""What is compared by default. "agent" is the shipped preset "balanced"; "tiles-2" are 2×2 tiles. Those that
cannot run on a pipeline are left out, with the reason. "cachedit-0.1", of that threshold, needs a transformer;
"recipe-FILE" is a recipe of `diffattn tune`."""


@contextmanager
def apply(name: str, pipe: Any, setting: Setting) -> Iterator[Draw]:
    """Change the pipeline within the block; gives a function that calls it with `num_inference_steps` and more.

    Raises:
        LeftOut: the variant cannot run here; the message says why.
        ValueError: an unknown variant.
    """
    peers = _peers(name)
    with ExitStack() as stack:
        draw: Draw = lambda **arguments: pipe(**arguments)  # noqa: E731
        for peer in sorted(peers, key=lambda peer: peer is not tgate):  # T-GATE has a loop of its own: the innermost
            draw = stack.enter_context(peer(pipe, draw, setting))
        yield draw


def check_names(names: list[str]) -> None:
    """Raises `ValueError` for a name that is not a variant."""
    for name in names:
        _peers(name)


def family(name: str) -> str:
    """For colours: the kind of a variant, or "combined"."""
    return "combined" if "+" in name else name.partition("-")[0]


def _peers(name: str) -> list[Peer]:
    found = []
    for part in name.split("+"):
        kind, _, rest = part.partition("-")
        try:
            found.append(KINDS[kind](rest))
        except (KeyError, ValueError):  # no such kind, no number
            raise ValueError(f"unknown variant {name!r}; such as: {', '.join((*VARIANTS, FLOOR))}") from None
    return found


@contextmanager
def _unchanged(pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    yield draw

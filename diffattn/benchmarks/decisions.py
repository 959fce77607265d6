"""Fills the cache of `diffattn.patch` beforehand: what is faster for the calls of one model on this machine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffattn.patching.patch import patch


def fill_cache(
    pipe: Any,
    path: Path,
    draw: Callable[[int | None], Any],
    *,
    sizes: Sequence[int] | None = None,
    preset: str = "balanced",
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, str]]:
    """Draw once at every size, and time each kind of call that is not in the cache yet.

    Args:
        pipe: an unpatched pipeline on its device.
        path: the cache, see `diffattn.patch(calibrate=...)`.
        draw: draws a picture of this many pixels a side; None: of the model's own size.
        sizes: in pixels; None: the model's own.
        preset: see `diffattn.patch`.
        say: called with lines about the results.

    Returns:
        Size, or "own" -> kind of call -> times and source, as `LayerReport.timed`.

    Raises:
        TypeError, ValueError: as `diffattn.patch`.
    """
    found: dict[str, dict[str, str]] = {}
    for size in sizes or (None,):
        with patch(pipe, preset=preset, calibrate=path) as handle:
            handle.quiet()
            draw(size)
            timed = {kind: text for layer in handle.report().layers for kind, text in layer.timed.items()}
        found["own" if size is None else str(size)] = timed
        for kind, text in timed.items():
            say(f"{kind}: {text}")
        if not timed:
            say(f"{size or 'own size'}: no call of attention that speed decides")
    return found

"""diffattn: linear-cost attention for diffusion models. `diffattn.patch(pipe)` makes a pipeline faster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffattn import functional
    from diffattn.drawing.loading import load_demo
    from diffattn.methods import METHODS
    from diffattn.methods.base import LayerSpec
    from diffattn.patching.hook import DiffAttnWarning
    from diffattn.patching.patch import Patch, patch, unpatch
    from diffattn.schedules import LatentChangeSchedule, NoiseSchedule
    from diffattn.tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "DiffAttnWarning",
    "LatentChangeSchedule",
    "LayerSpec",
    "NoiseSchedule",
    "Patch",
    "__version__",
    "functional",
    "load_demo",
    "patch",
    "tune",
    "unpatch",
]

_HOMES = {
    "METHODS": "methods",
    "DiffAttnWarning": "patching.hook",
    "LatentChangeSchedule": "schedules",
    "LayerSpec": "methods.base",
    "NoiseSchedule": "schedules",
    "Patch": "patching.handle",
    "load_demo": "drawing.loading",
    "patch": "patching.patch",
    "tune": "tuning.tune",
    "unpatch": "patching.patch",
}


def __getattr__(name: str) -> Any:
    """Import public names on first access, so that `diffattn --help` does not wait for torch."""
    if name == "functional":
        return import_module("diffattn.functional")
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"diffattn.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module 'diffattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

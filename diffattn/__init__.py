"""diffattn: linear-cost attention for diffusion models. `diffattn.patch(pipe)` makes a pipeline faster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffattn import functional
    from diffattn.evaluation.tune import tune
    from diffattn.injection import Patch, patch, unpatch
    from diffattn.loading import load_demo
    from diffattn.methods import METHODS
    from diffattn.methods.base import LayerSpec
    from diffattn.run_hook import DiffAttnWarning
    from diffattn.schedules import LatentChangeSchedule, NoiseSchedule

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
    "DiffAttnWarning": "run_hook",
    "LatentChangeSchedule": "schedules",
    "LayerSpec": "methods.base",
    "NoiseSchedule": "schedules",
    "Patch": "injection",
    "load_demo": "loading",
    "patch": "injection",
    "tune": "evaluation.tune",
    "unpatch": "injection",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that `diffattn --help` does not wait for torch."""
    if name == "functional":
        return import_module("diffattn.functional")
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"diffattn.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module 'diffattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

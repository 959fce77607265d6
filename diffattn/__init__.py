"""diffattn: linear-cost attention for diffusion models. `diffattn.patch(pipe)` makes a pipeline faster."""

from typing import Any

from diffattn import functional
from diffattn.injection import Patch, patch, unpatch
from diffattn.methods import METHODS
from diffattn.methods.base import LayerSpec
from diffattn.run_hook import DiffAttnWarning
from diffattn.schedules import NoiseSchedule

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "DiffAttnWarning",
    "LayerSpec",
    "NoiseSchedule",
    "Patch",
    "__version__",
    "functional",
    "load_demo",
    "patch",
    "unpatch",
]


def load_demo(name: str) -> Any:
    """An embedded model as a ready diffusers pipeline, without a network; see `diffattn.demo.load_demo`."""
    from diffattn.demo import load_demo

    return load_demo(name)

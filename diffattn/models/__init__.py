"""The DiT/SiT backbone, and the conversion of its checkpoints."""

from diffattn.models.config import PRESETS
from diffattn.models.dit import DiT

__all__ = ["PRESETS", "DiT"]

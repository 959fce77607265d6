"""What self-attention costs a pipeline here, and whether patching is worth it."""

from diffattn.preflight.result import Preflight
from diffattn.preflight.run import preflight

__all__ = ["Preflight", "preflight"]

"""Measures what self-attention costs a pipeline on this machine, and whether patching pays off."""

from diffattn.preflight.result import Preflight
from diffattn.preflight.run import preflight

__all__ = ["Preflight", "preflight"]

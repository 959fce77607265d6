"""The demo: embedded models draw the same pictures exact and accelerated, to compare speed and appearance."""

from diffattn.demo.comparison import PROMPTS, Demo, DemoResult, DemoSettings, Pair, run_demo
from diffattn.demo.mediators import MediatorRow, Mediators
from diffattn.drawing.loading import load_demo

__all__ = [
    "PROMPTS",
    "Demo",
    "DemoResult",
    "DemoSettings",
    "MediatorRow",
    "Mediators",
    "Pair",
    "load_demo",
    "run_demo",
]

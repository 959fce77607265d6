"""How pictures and times compare."""

from diffattn.evaluation.evaluate import EvaluateConfig, evaluate
from diffattn.evaluation.generate_set import DrawConfig
from diffattn.evaluation.paired import psnr, ssim
from diffattn.evaluation.preflight import Preflight, preflight
from diffattn.evaluation.sheet import comparison_sheet

__all__ = [
    "DrawConfig",
    "EvaluateConfig",
    "Preflight",
    "comparison_sheet",
    "evaluate",
    "preflight",
    "psnr",
    "ssim",
]

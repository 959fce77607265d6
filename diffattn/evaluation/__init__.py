"""How pictures and times compare."""

from diffattn.evaluation.paired import psnr, ssim
from diffattn.evaluation.sheet import comparison_sheet

__all__ = ["comparison_sheet", "psnr", "ssim"]

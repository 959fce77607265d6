"""The models of the benchmarks, by name: published sizes, and a tiny one of every class."""

from diffattn.measure.models.base import BenchmarkModel, Shape
from diffattn.measure.models.pictures import FLUX, PIXART_SIGMA, SD35_MEDIUM, Z_IMAGE
from diffattn.measure.models.tiny import (
    TINY,
    TINY_COGVIDEOX,
    TINY_FLUX,
    TINY_PIXART,
    TINY_SD3,
    TINY_WAN,
    TINY_Z_IMAGE,
)
from diffattn.measure.models.unets import SD15, SDXL
from diffattn.measure.models.videos import COGVIDEOX, WAN

__all__ = ["MODELS", "PUBLISHED", "UNETS", "BenchmarkModel", "Shape"]

UNETS: dict[str, BenchmarkModel] = {"sd15": SD15, "sdxl": SDXL, "tiny": TINY}

PUBLISHED: dict[str, BenchmarkModel] = {
    "sd15": SD15,
    "sdxl": SDXL,
    "sd35m": SD35_MEDIUM,
    "pixart-sigma": PIXART_SIGMA,
    "flux": FLUX,
    "z-image": Z_IMAGE,
    "wan-1.3b": WAN,
    "cogvideox-2b": COGVIDEOX,
}

MODELS: dict[str, BenchmarkModel] = {
    **PUBLISHED,
    "tiny": TINY,
    "tiny-sd3": TINY_SD3,
    "tiny-pixart": TINY_PIXART,
    "tiny-flux": TINY_FLUX,
    "tiny-z-image": TINY_Z_IMAGE,
    "tiny-wan": TINY_WAN,
    "tiny-cogvideox": TINY_COGVIDEOX,
}

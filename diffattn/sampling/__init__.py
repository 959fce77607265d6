"""Sampling from velocity models: the paths between noise and data, the SDE scheduler, and the pipeline."""

from diffattn.sampling.diffusion import DIFFUSIONS
from diffattn.sampling.euler_maruyama import EulerMaruyamaScheduler
from diffattn.sampling.paths import PATHS, Path
from diffattn.sampling.pipeline import SiTPipeline, SiTPipelineOutput

__all__ = ["DIFFUSIONS", "PATHS", "EulerMaruyamaScheduler", "Path", "SiTPipeline", "SiTPipelineOutput"]

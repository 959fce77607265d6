"""What the web page does, without the page: who may ask for what, one job at a time, its progress, Stop."""

from diffattn.jobs.choices import AUTOMATIC, Models, accelerations
from diffattn.jobs.compare import Comparison, Variant
from diffattn.jobs.limits import Limits
from diffattn.jobs.quality_run import Measurement, Run
from diffattn.jobs.run_trace import RunTrace
from diffattn.jobs.snippet import snippet
from diffattn.jobs.watch import Progress, Stopped
from diffattn.jobs.worker import Drawn, Worker

__all__ = [
    "AUTOMATIC",
    "Comparison",
    "Drawn",
    "Limits",
    "Measurement",
    "Models",
    "Progress",
    "Run",
    "RunTrace",
    "Stopped",
    "Variant",
    "Worker",
    "accelerations",
    "snippet",
]

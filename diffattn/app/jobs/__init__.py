"""The jobs behind the web page, independent of it: limits, the queue, progress and stopping."""

from diffattn.app.jobs.choices import AUTOMATIC, Models, accelerations
from diffattn.app.jobs.compare import Comparison, Variant
from diffattn.app.jobs.limits import Limits
from diffattn.app.jobs.quality_run import Measurement, QualityRun
from diffattn.app.jobs.run_trace import RunTrace
from diffattn.app.jobs.snippet import snippet
from diffattn.app.jobs.stops import Stopped, TooLong
from diffattn.app.jobs.visitor import Visitor
from diffattn.app.jobs.watch import JobProgress
from diffattn.app.jobs.worker import Drawn, Worker
from diffattn.drawing.batch import NotFinite

__all__ = [
    "AUTOMATIC",
    "Comparison",
    "Drawn",
    "JobProgress",
    "Limits",
    "Measurement",
    "Models",
    "NotFinite",
    "QualityRun",
    "RunTrace",
    "Stopped",
    "TooLong",
    "Variant",
    "Visitor",
    "Worker",
    "accelerations",
    "snippet",
]

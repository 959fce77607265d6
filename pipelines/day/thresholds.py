"""The thresholds of the device: from how many tokens landmarks are faster than exact attention."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from diffattn.benchmarks.thresholds import measure_thresholds, save_thresholds

from .item import Item, Setting

KIND = "thresholds"
FILE = "thresholds.json"
MINUTES = 2.0


def items(setting: Setting) -> Iterator[Item]:
    yield Item("thresholds", KIND, "thresholds of landmarks", MINUTES, partial(measure, setting))


def measure(setting: Setting, deadline: float) -> dict[str, Any]:
    """Measure like `diffattn bench thresholds`, but into a file of the folder, which `DIFFATTN_THRESHOLDS` may name."""
    sizes: dict[str, Any] = {"sides": (8, 12)} if setting.tiny else {}
    seconds = min(60 * MINUTES, deadline - time.monotonic())
    results = measure_thresholds(setting.device, setting.dtype, time_budget=seconds, say=lambda line: None, **sizes)
    if not results:
        return {"complete": False}
    row = save_thresholds(setting.out / FILE, setting.device, setting.dtype, results)
    ratios = {str(r.tokens): dict(r.ratios) for r in results}
    return {"complete": True, "file": FILE, "thresholds": row, "time_ratios": ratios}

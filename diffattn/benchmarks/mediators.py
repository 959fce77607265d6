"""Speed of mediator attention against softmax attention: a transformer block and a whole model, forward and in
training, over the number of tokens.

Softmax and every number of mediators take turns (see `measure.interleave`) on the same weights. The results are one
JSON file, complete after every round; `resume` continues from it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any

from diffattn.benchmarks.mediator_subjects import SOFTMAX, WHAT, WIDTHS, Subject, gflops, memory_needed
from diffattn.benchmarks.result_file import ResultFile
from diffattn.files import write_json
from diffattn.functional import mediator_side
from diffattn.machine import cpu_threads, describe_machine, dtype_name, resolve
from diffattn.measure.interleave import Timings, interleave
from diffattn.measure.memory import peak_mib, total_memory
from diffattn.models.config import check_one_of

RESULT_FILE = "mediator.json"
FORWARD, TRAINING = "forward", "training"
MODES = (FORWARD, TRAINING)
MEMORY_SHARE = 0.85  # of the memory of the device that a measurement may need

Say = Callable[[str], None]


@dataclass(frozen=True)
class MediatorBenchmarkConfig:
    """What to measure.

    Raises:
        ValueError: a name or number that is not allowed; the message names it and the allowed ones.
    """

    what: tuple[str, ...] = WHAT
    widths: tuple[str, ...] = ("S", "XL")
    sizes: tuple[int, ...] = (256, 1024, 4096, 16384)  # tokens, of square grids
    modes: tuple[str, ...] = MODES
    mediators: tuple[int, ...] = (4, 16, 64)
    rounds: int = 9
    batch: int = 1
    device: str = "auto"  # the first available of cuda, mps, cpu
    dtype: str = "auto"  # see `machine.fastest_dtype`
    threads: int | None = None  # CPU threads; None: torch's default

    def __post_init__(self) -> None:
        for name, allowed in (("what", WHAT), ("widths", tuple(WIDTHS)), ("modes", MODES)):
            for value in getattr(self, name):
                check_one_of(name, value, allowed)
        for name in ("what", "widths", "sizes", "modes", "mediators"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for tokens in self.sizes:
            if tokens < 1 or isqrt(tokens) ** 2 != tokens:
                raise ValueError(f"sizes are tokens of square grids, so perfect squares, got {tokens}")
            for n in self.mediators:
                mediator_side(n, (isqrt(tokens), isqrt(tokens)))
        for name in ("rounds", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")


@dataclass(frozen=True)
class TimedCase:
    """One comparison of all variants."""

    subject: Subject
    mode: str

    @property
    def key(self) -> tuple[str, int, str]:
        """The key in `ResultFile`: model, size, mode."""
        return f"{self.subject.what} {self.subject.width}", self.subject.tokens, self.mode

    @property
    def title(self) -> str:
        what, tokens, mode = self.key
        return f"{what}, {tokens} tokens, {mode}"

    @property
    def work(self) -> float:
        """Approximate operations of one call of every variant together, to order and predict the work."""
        s = self.subject
        dim = WIDTHS[s.width]["hidden_size"]
        per_token = 24 * dim**2 * len(s.variants) + 4 * s.tokens * dim
        return per_token * s.tokens * s.batch * s.depth * (3 if self.mode == TRAINING else 1)


class MediatorBenchmark:
    """One benchmark, checked and ready to run; its results are `RESULT_FILE` in the folder `out`."""

    def __init__(self, config: MediatorBenchmarkConfig, out: Path, *, resume: bool = False) -> None:
        """With `resume`, existing results in the folder are kept and only missing ones are measured.

        Raises:
            ValueError: the device cannot be used, or the results to resume were made under other conditions.
        """
        self.config = config
        self.device, self.dtype = resolve(config.device, config.dtype)
        with cpu_threads(config.threads):
            settings = asdict(config) | {"device": str(self.device), "dtype": dtype_name(self.dtype)}
            conditions = {"machine": describe_machine(self.device), "settings": settings}
            self.results = ResultFile(out / RESULT_FILE, conditions, resume)
        self.left_out: dict[tuple[str, int, str], str] = {}
        self._too_large: set[tuple[str, int, str]] = set()

    def run(self, *, time_budget: float | None = None, say: Say = print) -> dict[str, Any]:
        """Measure, cheapest first, and return the content of the result file.

        Args:
            time_budget: seconds; comparisons that would exceed the remaining time are skipped, and costly ones get
                fewer rounds, so that each gets some. Results that were cut short have `complete` false.
            say: called with lines about the progress.
        """
        deadline = None if time_budget is None else time.monotonic() + time_budget
        missing = self._missing()
        seconds_per_work = 0.0
        with cpu_threads(self.config.threads):
            for i, job in enumerate(missing):
                now = time.monotonic()
                left = None if deadline is None else deadline - now
                if why := self._reason_to_skip(job, left, 2 * job.work * seconds_per_work):
                    self.left_out[job.key] = why
                    say(f"{job.title}: left out, {why}")
                    continue
                share = None if left is None else now + left / (len(missing) - i)
                self._measure(job, share, say)
                seconds_per_work = self._seconds_of_round(job) / job.work
        return self._summarised()

    @property
    def is_complete(self) -> bool:
        """Whether everything that fits in memory has been measured."""
        return all(job.key in self._too_large for job in self._missing())

    def _missing(self) -> list[TimedCase]:
        c = self.config
        jobs = [
            TimedCase(Subject(what, width, tokens, c.mediators, c.batch, self.device, self.dtype), mode)
            for what, width, tokens, mode in product(c.what, c.widths, c.sizes, c.modes)
        ]
        open_ = [job for job in jobs if not self.results.is_done(*job.key, c.rounds, job.subject.variants)]
        return sorted(open_, key=lambda job: job.work)

    def _reason_to_skip(self, job: TimedCase, seconds_left: float | None, expected: float) -> str | None:
        """Why this comparison is skipped, or None; `expected`: seconds of its warm-up and first round, 0 if unknown."""
        needed, there = memory_needed(job.subject, job.mode == TRAINING) / 2**30, total_memory(self.device) / 2**30
        if needed > MEMORY_SHARE * there:
            self._too_large.add(job.key)
            return f"it needs about {needed:.1f} GiB of memory, but there are {there:.1f}"
        if seconds_left is not None and expected and expected > seconds_left:
            return f"a round would take about {expected / 120:.1f} minutes, too long for the time budget"
        return None

    def _measure(self, job: TimedCase, deadline: float | None, say: Say) -> None:
        """All variants of one comparison, interleaved after one call each that is not timed."""
        subject = replace(job.subject)  # which only holds the weights during this call
        training, rounds = job.mode == TRAINING, self.config.rounds
        model, size, mode = job.key
        names = subject.variants
        counted = gflops(subject, training)
        calls = {name: subject.step(name, training) for name in names}
        peaks = {name: peak_mib(call, self.device) for name, call in calls.items()}

        def keep(timings: Timings) -> None:
            done, figures = len(timings.rounds), timings.to_dict()
            for name, variant in figures["variants"].items():
                variant |= {"gflops": counted[name], "peak_mib": peaks[name]}
            entry = {"model": model, "size": size, "mode": mode, "complete": done >= rounds, "left_out": {}}
            self.results.put(entry | figures)
            say(f"{job.title}: round {done} of {rounds}, {sum(timings.rounds[-1].values()):.2f} s")

        finished = self.results.rounds_of(model, size, mode, names)
        interleave(calls, rounds, 0, self.device, finished=finished, deadline=deadline, on_round=keep)

    def _seconds_of_round(self, job: TimedCase) -> float:
        entry = self.results.find(*job.key)
        assert entry is not None
        return sum(variant["seconds_per_round"][-1] for variant in entry["variants"].values())

    def _summarised(self) -> dict[str, Any]:
        data = self.results.data
        data["left_out"] = [
            {"model": model, "size": size, "mode": mode, "why": why}
            for (model, size, mode), why in self.left_out.items()
        ]
        data["pays_from"] = pays_from(data)
        write_json(self.results.path, data)
        return data


def pays_from(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, int | None]]]:
    """Block or model -> mode -> number of mediators -> the smallest measured number of tokens from which mediators are
    faster than softmax up to the largest measured one: the upper quartile of their time ratio is below 1. None if they
    are not faster at the largest."""
    table: dict[str, dict[str, dict[str, int | None]]] = {}
    entries = sorted(results["results"], key=lambda entry: entry["size"], reverse=True)
    slower: set[tuple[str, str, str]] = set()
    for entry in entries:
        for n, variant in entry["variants"].items():
            if n == SOFTMAX:
                continue
            key = (entry["model"], entry["mode"], n)
            row = table.setdefault(entry["model"], {}).setdefault(entry["mode"], {})
            row.setdefault(n, None)
            if variant["time_ratio"]["iqr"][1] >= 1:
                slower.add(key)
            elif key not in slower:
                row[n] = entry["size"]
    return table

"""Measurements of speed and quality: requests, results, their file format, and which results can be compared."""

import csv
import io
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from diffattn.app.jobs.naming import naming
from diffattn.evaluation.quality import QualityResult
from diffattn.files import read_json, write_json
from diffattn.machine import where
from diffattn.measure.interleave import Spread

FORMAT = "diffattn speed and quality 1"
RUNS_FILE = "speed_quality.json"
"""File in a model's folder with the runs to show before anything is measured."""

REFERENCE_FILE = "reference.safetensors"
"""File in a model's folder with the reference for its pictures, see `Reference.save`."""

MAX_RUNS = 100  # in one file
MAX_FIGURE = 1e12  # of either sign
COLUMNS = (
    "run", "model", "acceleration", "seconds", "seconds_q25", "seconds_q75", "speedup", "gflops", "num_pictures",
)  # fmt: skip
SCORES = ("fid", "fid_std", "kid", "kid_std", "precision", "recall", "fid_infinity", "accuracy")


@dataclass(frozen=True)
class Measurement:
    """What to measure; checked by `Limits.measurement`."""

    models: tuple[str, ...]
    accelerations: tuple[str, ...]  # see `choices.accelerations`; exact attention is always measured too
    numbers: tuple[int, ...]  # of agents or mediators, at every noise level
    samples: int = 16  # N pictures of each
    steps: int = 20
    guidance: float | None = None  # None: the model's own
    prompts: tuple[str, ...] = ()  # picture i draws prompt i modulo their number; empty: the model's own
    extractor: str = "automatic"
    against: str = "automatic"  # "automatic": the model's stored reference if it has one; "exact": its exact pictures
    seed: int = 0

    @property
    def num_variants(self) -> int:
        """Variants of one model, exact attention included."""
        return 1 + len(self.accelerations) + len(self.numbers)


@dataclass(frozen=True)
class Line:
    """One way to draw with one model."""

    acceleration: str
    quality: QualityResult
    seconds: Spread  # of a picture
    speedup: float  # 1 / median of the time ratios to exact attention, picture by picture
    gflops: float | None  # of a picture; None: not counted
    span: tuple[float, float] | None = None  # 95 % interval of the speed-up; None: not known, or exact attention

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self) | {"seconds": self.seconds.to_dict(), "quality": self.quality.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; raises `ValueError` for anything else."""
        seconds = data["seconds"]
        low, high = seconds["iqr"]
        times = Spread(_finite(seconds["median"]), _finite(low), _finite(high))
        quality = QualityResult.from_dict(data["quality"])
        scores = {name: _finite(value) for name, value in quality.scores.items() if name in SCORES}
        if not {"fid", "kid", "kid_std"} <= set(scores):
            raise ValueError("a result has no fid, kid and kid_std")
        gflops, span = data["gflops"], data.get("span")
        return cls(
            str(data["acceleration"])[:80],
            QualityResult(quality.subject, quality.protocol, scores),
            times,
            _finite(data["speedup"]),
            None if gflops is None else _finite(gflops),
            None if span is None else _two(span),
        )


@dataclass(frozen=True)
class QualityRun:
    """All ways to draw with one model, under one protocol."""

    title: str
    model: str
    prompts: tuple[str, ...]
    machine: Mapping[str, Any]
    lines: tuple[Line, ...]  # the first is exact

    @property
    def where(self) -> str:
        """A description of the machine that did the work."""
        return str(where(dict(self.machine)))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        found = {"title": self.title, "model": self.model, "prompts": list(self.prompts)}
        return found | {"machine": dict(self.machine), "lines": [line.to_dict() for line in self.lines]}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: anything else.
        """
        try:
            machine, lines = dict(data["machine"]), tuple(Line.from_dict(line) for line in data["lines"])
            found = cls(
                str(data["title"])[:200],
                str(data["model"])[:200],
                tuple(str(p) for p in data["prompts"]),
                machine,
                lines,
            )
            found.where  # noqa: B018, a machine that cannot be named
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a run: {type(error).__name__} {error}") from None
        if not lines:
            raise ValueError("not a run: it has no lines")
        return found


def read_runs(path: Path) -> list[QualityRun]:
    """The runs in a file written by `save_runs`.

    Raises:
        ValueError: not such a file; the message says what is wrong with it.
    """
    with naming(path, path.name):
        data = read_json(path)
    if data.get("format") != FORMAT or not isinstance(data.get("runs"), list):
        raise ValueError(f"{path.name!r} is not a file of results saved by this page (format {FORMAT!r})")
    if len(data["runs"]) > MAX_RUNS:
        raise ValueError(f"{path.name!r} contains {len(data['runs'])} runs; the limit is {MAX_RUNS}")
    return [QualityRun.from_dict(run) for run in data["runs"]]


def save_runs(runs: Sequence[QualityRun], path: Path) -> None:
    """Write these runs to a JSON file, replacing it."""
    write_json(path, {"format": FORMAT, "runs": [run.to_dict() for run in runs]})


def runs_as_csv(runs: Sequence[QualityRun]) -> str:
    """One row per line of every run: figures first, the whole protocol as JSON last."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, *SCORES, "extractor", "reference", "where", "protocol"])
    for run in runs:
        for line in run.lines:
            s, p = line.seconds, line.quality.protocol
            figures = [run.title, run.model, line.acceleration, s.median, s.q25, s.q75, line.speedup, line.gflops]
            scores = [line.quality.scores.get(name) for name in SCORES]
            whole = json.dumps(asdict(p), sort_keys=True)
            row = [*figures, p.num_pictures, *scores, p.extractor, p.reference, run.where, whole]
            writer.writerow([_no_formula(cell) for cell in row])
    return text.getvalue()


def comparable(runs: Sequence[QualityRun], by_time: bool) -> list[list[QualityRun]]:
    """Group runs whose figures can be compared: one protocol, and one machine if times are compared."""
    groups: list[list[QualityRun]] = []
    for run in runs:
        for group in groups:
            protocols = (run.lines[0].quality.protocol, group[0].lines[0].quality.protocol)
            if not protocols[0].differences(protocols[1]) and (not by_time or run.where == group[0].where):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def why_apart(run: QualityRun, other: QualityRun) -> str:
    """Why the figures of two runs cannot be compared, as text; empty if they can."""
    found = run.lines[0].quality.protocol.differences(other.lines[0].quality.protocol)
    names = [name.replace("_", " ") for name in found]
    return ", ".join(names + (["machine"] if run.where != other.where else []))


def _finite(value: Any) -> float:
    """Check that charts can show a figure."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_FIGURE:
        raise ValueError(f"a figure must be a number of at most {MAX_FIGURE:g}, got {reprlib.repr(value)}")
    return float(value)


def _two(span: Any) -> tuple[float, float]:
    low, high = map(_finite, span)
    return low, high


def _no_formula(cell: Any) -> Any:
    """Mark text that a spreadsheet would run as a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell

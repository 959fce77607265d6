"""The runs that a visitor sees: those stored with the models, and their own latest ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffattn.app.jobs.quality_run import QualityRun

MOST = 12  # of a visitor's own runs; the oldest are dropped first


def keep(kept: Sequence[Mapping[str, Any]], new: Sequence[QualityRun]) -> list[dict[str, Any]]:
    """A visitor's runs, as JSON types, with new ones added: each title once, the latest `MOST`."""
    return list(_every(kept, new).values())[-MOST:]


def not_kept(kept: Sequence[Mapping[str, Any]], new: Sequence[QualityRun]) -> int:
    """How many runs `keep` drops."""
    return max(len(_every(kept, new)) - MOST, 0)


def runs_to_show(stored: Sequence[QualityRun], kept: Sequence[Mapping[str, Any]]) -> list[QualityRun]:
    """The stored runs, then the visitor's own that are not among them."""
    titles = {run.title for run in stored}
    own = [QualityRun.from_dict(run) for run in kept]
    return [*stored, *(run for run in own if run.title not in titles)]


def _every(kept: Sequence[Mapping[str, Any]], new: Sequence[QualityRun]) -> dict[str, dict[str, Any]]:
    """Title -> run, oldest first; a new run replaces an older one of the same title and moves to the end."""
    titles = {run.title for run in new}
    older = {run["title"]: dict(run) for run in kept if run["title"] not in titles}
    return older | {run.title: run.to_dict() for run in new}

"""Which runs a visitor has: those stored with the models, and the latest own ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffattn.jobs.quality_run import Run

MOST = 12  # own runs that are kept; the oldest go first


def keep(kept: Sequence[Mapping[str, Any]], new: Sequence[Run]) -> list[dict[str, Any]]:
    """Own runs as JSON types with new ones added, each once."""
    titles = {run.title for run in new}
    older = [dict(run) for run in kept if run["title"] not in titles]
    return [*older, *(run.to_dict() for run in new)][-MOST:]


def runs_to_show(stored: Sequence[Run], kept: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Stored runs, then own ones that are not among them."""
    titles = {run.title for run in stored}
    own = [Run.from_dict(run) for run in kept]
    return [*stored, *(run for run in own if run.title not in titles)]

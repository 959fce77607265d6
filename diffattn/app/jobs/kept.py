"""The runs that a visitor sees: those stored with the models, and their own latest ones."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from diffattn.app.jobs.quality_run import QualityRun

MAX_TITLE = 80  # characters that a visitor may give
MOST = 12  # of a visitor's own runs; the oldest are dropped first


def keep(kept: Sequence[Mapping[str, Any]], new: Sequence[QualityRun]) -> list[dict[str, Any]]:
    """A visitor's runs, as JSON types, with new ones added: each title once, the latest `MOST`."""
    return list(_every(kept, new).values())[-MOST:]


def not_kept(kept: Sequence[Mapping[str, Any]], new: Sequence[QualityRun]) -> int:
    """How many runs `keep` drops."""
    return max(len(_every(kept, new)) - MOST, 0)


def runs_to_show(stored: Sequence[QualityRun], kept: Sequence[Mapping[str, Any]]) -> list[QualityRun]:
    """The visitor's own runs that are not among the stored ones, the newest first; then the stored ones."""
    titles = {run.title for run in stored}
    own = [QualityRun.from_dict(run) for run in reversed(kept)]
    return [*(run for run in own if run.title not in titles), *stored]


def without(kept: Sequence[Mapping[str, Any]], titles: Collection[str]) -> list[dict[str, Any]]:
    """A visitor's runs except those with these titles."""
    return [dict(run) for run in kept if run["title"] not in titles]


def renamed(kept: Sequence[Mapping[str, Any]], titles: Collection[str], name: object) -> list[dict[str, Any]]:
    """A visitor's runs, with the one that has one of these titles renamed.

    Raises:
        ValueError: not exactly one of their own runs has one of the titles; a name that is empty, too long or taken.
    """
    found = [run["title"] for run in kept if run["title"] in titles]
    if len(found) != 1:
        raise ValueError(f"tick exactly one of your own runs to rename it; {len(found)} are ticked")
    if not isinstance(name, str) or not 0 < len(name.strip()) <= MAX_TITLE:
        raise ValueError(f"a name must have 1 to {MAX_TITLE} characters, got {str(name)[:40]!r}")
    if name.strip() in {run["title"] for run in kept}:
        raise ValueError(f"you already have a run named {name.strip()!r}; choose another")
    return [dict(run) | ({"title": name.strip()} if run["title"] == found[0] else {}) for run in kept]


def _every(kept: Sequence[Mapping[str, Any]], new: Sequence[QualityRun]) -> dict[str, dict[str, Any]]:
    """Title -> run, oldest first; a new run replaces an older one of the same title and moves to the end."""
    titles = {run.title for run in new}
    older = {run["title"]: dict(run) for run in kept if run["title"] not in titles}
    return older | {run.title: run.to_dict() for run in new}

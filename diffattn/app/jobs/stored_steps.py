"""The steps of one run stored beside a model, for the page to show before anybody has drawn."""

from pathlib import Path
from typing import Any

from diffattn.app.jobs.naming import naming
from diffattn.app.jobs.run_trace import RunTrace
from diffattn.files import read_json, write_json

FILE = "first_steps.json"


def read_steps(folder: Path | None) -> RunTrace | None:
    """What is stored in a model's folder; None if nothing is.

    Raises:
        ValueError: its file is damaged.
    """
    path = folder / FILE if folder else None
    if folder is None or path is None or not path.is_file():
        return None
    with naming(folder, folder.name):
        found: dict[str, Any] = read_json(path)
        try:
            return RunTrace.from_dict(found)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} contains no steps: {error}") from None


def write_steps(trace: RunTrace, title: str, folder: Path) -> None:
    """Store the steps of a run in a folder, replacing what is there.

    Args:
        title: of the run, as the page shows it: what was drawn, and how.
    """
    data = trace.to_dict() | {"title": title, "seconds": [round(seconds, 6) for seconds in trace.seconds]}
    write_json(folder / FILE, data)

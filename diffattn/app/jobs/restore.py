"""The settings that drew a picture, read from the record in its file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffattn.app.jobs.choices import AUTOMATIC, Models, accelerations
from diffattn.app.jobs.limits import Limits
from diffattn.app.jobs.naming import naming
from diffattn.architectures.decisions import read_given
from diffattn.drawing.request import UNPATCHED, Request, record_of

SETTINGS = (
    "prompt", "model", "acceleration", "steps", "guidance", "width", "height", "seed", "num_images", "negative_prompt",
    "recipe",
)  # fmt: skip
"""Names of the values that make a request, in the order in which the page's endpoints take them."""


def record_of_file(path: Path) -> dict[str, Any]:
    """As `record_of`, of a PNG that this page (or `diffattn generate`) drew; errors name it without its folder."""
    with naming(path, path.name):
        return record_of(path)


def settings_of_record(record: Mapping[str, Any], models: Models, limits: Limits) -> dict[str, Any]:
    """The value of each of `SETTINGS` for a picture's record, which is untrusted.

    A guidance below 1, which is off like 1, becomes 1: on the page 0 stands for the model's own.

    Raises:
        ValueError: its settings are not allowed here; the message says which.
    """
    if not isinstance(record, Mapping):
        raise ValueError("a record must be an object")
    given = {name: record.get(name) for name in SETTINGS}
    given |= {"num_images": 1, **_way(record)}
    guidance = given["guidance"]
    if isinstance(guidance, int | float) and not isinstance(guidance, bool) and 0 <= guidance < 1:
        given["guidance"] = 1.0
    read_given(record.get("decisions"))
    return checked_settings(given, models, limits)


def as_recorded(asked: Request, record: Mapping[str, Any] | None, models: Models, limits: Limits) -> Request:
    """A request that follows the decisions in the record of a picture, if it asks for that picture: the same calls then
    run accelerated, whatever is faster on this machine.

    Args:
        asked: what is to be drawn; it may be further pictures too.
        record: whose settings were restored, see `settings_of_record`; None: nobody's.
    """
    decisions = record and record.get("decisions")
    if not record or not decisions:
        return asked
    first = limits.request(**settings_of_record(record, models, limits))
    return replace(asked, decisions=decisions) if replace(asked, num_images=1) == first else asked


def checked_settings(given: Any, models: Models, limits: Limits) -> dict[str, Any]:
    """Untrusted values of `SETTINGS`, each of a valid request; raises `ValueError` like `Limits.request`."""
    if not isinstance(given, Mapping):
        raise ValueError("settings must be an object")
    found: dict[str, Any] = {name: given.get(name) for name in SETTINGS}
    if not isinstance(found["recipe"], Mapping | None):  # text would be the path of a file on the server
        raise ValueError("a recipe must be an object")
    models.source(found["model"])
    asked = limits.request(**found)
    kept = ("prompt", "model", "steps", "guidance", "width", "height", "seed", "num_images")
    usual = {name: getattr(asked, name) for name in kept} | {"negative_prompt": asked.negative_prompt or ""}
    return usual | {"acceleration": found["acceleration"] or AUTOMATIC, "recipe": asked.recipe}


def _way(record: Mapping[str, Any]) -> dict[str, Any]:
    """Acceleration and recipe; options that no acceleration has go into a recipe."""
    method, preset, options = record.get("method"), record.get("preset"), record.get("options")
    if record.get("recipe") is not None:
        return {"acceleration": AUTOMATIC, "recipe": record["recipe"]}
    if options:
        own = {"method": method, "options": options} | ({"preset": preset} if preset else {})
        return {"acceleration": AUTOMATIC, "recipe": own}
    if method == UNPATCHED:
        return {"acceleration": UNPATCHED, "recipe": None}
    name = f"{method}/{preset}"
    return {"acceleration": name if name in accelerations() else AUTOMATIC, "recipe": None}

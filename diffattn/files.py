"""Files and their names: untrusted JSON, JSON files that are replaced whole, names made of prompts."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 32  # objects and lists within each other
MAX_DIGITS = 20  # of a whole number; Python's own have no end, and overflow where they meet a float
MAX_BYTES = 180  # of a stem: file systems take 255 in a name, and what tells pictures of a prompt apart comes behind it


def read_text(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: not JSON, nested more than `MAX_DEPTH` deep, or with a whole number of more than `MAX_DIGITS`.
    """
    try:
        found = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise _too_deep() from None
    level = [found]
    for _ in range(MAX_DEPTH + 1):
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise _too_deep()
    return found


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _parts(whole: Any) -> Any:
    if isinstance(whole, dict):
        return whole.values()
    return whole if isinstance(whole, list) else ()


def _too_deep() -> ValueError:
    return ValueError(f"objects and lists are nested more than {MAX_DEPTH} deep")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: not there, not JSON, not an object, or nested too deeply; the message names the file.
    """
    try:
        data = read_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a readable JSON file: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{str(path)!r} does not hold a JSON object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace the file at once, so that an interrupt leaves the old one or the new one. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def stem_of(prompt: str) -> str:
    """The words of a prompt with hyphens between them, at most `MAX_BYTES` in UTF-8; "empty" where there are none."""
    words = re.sub(r"\W+", "-", prompt).strip("-")[:60]
    return words.encode()[:MAX_BYTES].decode(errors="ignore").strip("-") or "empty"

"""Files and their names: files replaced whole, untrusted JSON, names made from prompts."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 32  # objects and lists within each other
MAX_DIGITS = 20  # of a whole number; Python's own have no end, and overflow where they meet a float
MAX_BYTES = 180  # of a stem: file systems take 255 in a name, and what tells pictures of a prompt apart comes behind it


def write_whole(path: Path, write: Callable[[Path], object], *, flush: bool = False) -> None:
    """Replace a file in one step: a reader, and whoever comes after an interrupt, sees the old file or the new one.

    Args:
        path: the file; its folder is made if missing.
        write: called with the path of a temporary file beside it, and writes that. The temporary file is hidden, ends
            in ".part", and is removed if `write` fails.
        flush: return only when the contents have reached the disk, so that a power cut cannot lose them either.

    Raises:
        OSError: the folder or the file cannot be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        if flush:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.chmod(0o644)  # temporary files and safetensors are written readable by their owner only
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
    """Write a JSON object, see `write_whole`."""
    text = json.dumps(data, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def stem_of(prompt: str) -> str:
    """The words of a prompt with hyphens between them, at most `MAX_BYTES` in UTF-8; "empty" where there are none."""
    words = re.sub(r"\W+", "-", prompt).strip("-")[:60]
    return words.encode()[:MAX_BYTES].decode(errors="ignore").strip("-") or "empty"

"""Text files from any source, untrusted JSON, atomic file replacement, and file names from prompts."""

import codecs
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MAX_DEPTH = 32  # nesting of objects and lists
MAX_DIGITS = 20  # of an integer; Python's are unlimited, and overflow when combined with floats
MAX_BYTES = 180  # of a stem: file systems allow 255 per name, and a suffix that distinguishes the pictures follows

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, since its mark begins with UTF-16's
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Byte-order mark -> encoding. Text without a mark is UTF-8."""

NOWHERE = Path(os.devnull, "no home directory")
"""Stands for the folder of a user who has none: nothing is in it, and nothing can be written to it."""

_LINE_END = re.compile(r"\r\n|\r|\n")


def user_folder(variable: str, name: str) -> Path:
    """A folder of the user.

    Args:
        variable: the environment variable that names it.
        name: its usual name in the home directory.

    Returns:
        `NOWHERE` if neither is known, as for services without a home directory.
    """
    if given := os.environ.get(variable):
        return Path(given)
    try:
        return Path.home() / name
    except RuntimeError:
        return NOWHERE


def decode_text(data: bytes) -> str:
    """Decode text written by any program: UTF-8, or UTF-16 or UTF-32 with a byte-order mark.

    The mark is removed. Line endings are kept.

    Raises:
        ValueError: invalid bytes, or a NUL character, as in UTF-16 without a mark; the message names the line, counted
            from 1.
    """
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    encoding, data = BYTE_ORDER_MARKS.get(mark, "utf-8"), data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line_of(data[: error.start].decode(encoding))
        wrong = data[error.start : error.start + 4].hex(" ")
        raise ValueError(
            f"line {line} contains bytes that are not {encoding.upper()} ({wrong}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = _line_of(text.partition("\0")[0])
        raise ValueError(f"line {line} contains a NUL character, so this is not UTF-8 text; save the file as UTF-8")
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their ends.

    Lines end with LF, CR LF or CR, as in text files. Other characters that Unicode counts as line breaks, such as
    U+2028 and U+0085, do not end a line, since captions and JSON contain them. Byte-order marks at the start of a line,
    as in concatenated files, are removed.
    """
    lines = [line.removeprefix("\ufeff") for line in _LINE_END.split(text)]
    return lines if lines[-1] else lines[:-1]


def read_lines(source: Path | bytes) -> list[str]:
    """The lines of a text file or of its content; see `decode_text` and `split_lines`.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `decode_text`.
    """
    return split_lines(decode_text(source if isinstance(source, bytes) else source.read_bytes()))


def _line_of(before: str) -> int:
    """The number, from 1, of the line that continues (or starts) after this text."""
    return len(_LINE_END.findall(before)) + 1


def is_there(path: Path) -> bool:
    """Whether there is such a file, as far as one can see: not in a folder that must not be entered."""
    return os.path.isfile(path)  # noqa: PTH113 - `Path.is_file` raises there


class CannotWrite(OSError):
    """Something could not be written, for example on a full disk: the message names it, `strerror` is the reason."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `CannotWrite` for a file or folder that the block fails to write, since the system rarely names it."""
    try:
        yield
    except CannotWrite:  # names a part of it
        raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
        failure = CannotWrite(f"cannot write to {str(path)!r}: {reason}")
        failure.strerror = reason
        raise failure from error


def write_whole(path: Path, write: Callable[[Path], object], *, flush: bool = False) -> None:
    """Replace a file atomically: readers see the old file or the new one, even after an interrupt.

    A link keeps its place, and the file that it leads to is replaced. A device or a pipe is written as it is.

    Args:
        path: the file; its folder is created if missing.
        write: called with the path of a temporary file beside it, to be written. The temporary file is hidden, ends
            in ".part", and is removed if `write` fails.
        flush: only return once the contents are on disk, so that not even a power cut can lose them.

    Raises:
        CannotWrite: the folder or the file cannot be written; an existing file is untouched.
    """
    with writing(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            write(path)
        else:
            _replace(path.resolve() if path.is_symlink() else path, write, flush)


def _replace(path: Path, write: Callable[[Path], object], flush: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        if flush:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.chmod(0o644)  # temporary files and safetensors are created readable by their owner only
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_text(text: str) -> Any:
    """Parse untrusted JSON; reject deep nesting and oversized integers.

    Raises:
        ValueError: not JSON, nested more than `MAX_DEPTH` deep, or an integer of more than `MAX_DIGITS` digits.
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
        ValueError: no such file, not JSON, not an object, or nested too deeply; the message names the file.
    """
    try:
        data = read_text(decode_text(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a readable JSON file: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{str(path)!r} does not contain a JSON object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, see `write_whole`."""
    text = json.dumps(data, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def stem_of(prompt: str) -> str:
    """The words of a prompt joined by hyphens, at most `MAX_BYTES` bytes of UTF-8; "empty" if there are none."""
    words = re.sub(r"\W+", "-", prompt).strip("-")[:60]
    return words.encode()[:MAX_BYTES].decode(errors="ignore").strip("-") or "empty"

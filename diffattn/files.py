"""Text files from anywhere, untrusted JSON, files that are replaced whole, and names made from prompts."""

import codecs
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 32  # objects and lists within each other
MAX_DIGITS = 20  # of a whole number; Python's own have no limit, and overflow where they meet a float
MAX_BYTES = 180  # of a stem: file systems allow 255 in a name, and what distinguishes pictures of a prompt follows it

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Byte-order mark -> the encoding that it stands for. Text without a mark is UTF-8."""

_LINE_END = re.compile(r"\r\n|\r|\n")


def decode_text(data: bytes) -> str:
    """The text of a file that any program may have written: UTF-8, or UTF-16 or UTF-32 with a byte-order mark.

    The mark is not part of the text. Line ends stay as they are.

    Raises:
        ValueError: bytes that are no such text, or a NUL character, as in UTF-16 without a mark; the message names the
            line, counted from 1.
    """
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    encoding, data = BYTE_ORDER_MARKS.get(mark, "utf-8"), data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line_of(data[: error.start].decode(encoding))
        wrong = data[error.start : error.start + 4].hex(" ")
        raise ValueError(
            f"line {line} holds bytes that are not {encoding.upper()} ({wrong}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = _line_of(text.partition("\0")[0])
        raise ValueError(f"line {line} holds a NUL character, so this is no UTF-8 text; save the file as UTF-8")
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their ends.

    Lines end with LF, CR LF or CR, as in text files. Other characters that Unicode counts as line breaks, such as
    U+2028 and U+0085, are part of a line: captions and JSON hold them. Byte-order marks at the start of a line, as
    joined files have them, are left out.
    """
    lines = [line.removeprefix("\ufeff") for line in _LINE_END.split(text)]
    return lines if lines[-1] else lines[:-1]


def read_lines(source: Path | bytes) -> list[str]:
    """The lines of a text file, or of its content; see `decode_text` and `split_lines`.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `decode_text`.
    """
    return split_lines(decode_text(source if isinstance(source, bytes) else source.read_bytes()))


def _line_of(before: str) -> int:
    """The number of the line, from 1, that begins after or goes on from this text."""
    return len(_LINE_END.findall(before)) + 1


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
    """The value that a JSON text holds.

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
        ValueError: no such file, not JSON, not an object, or nested too deeply; the message names the file.
    """
    try:
        data = read_text(decode_text(path.read_bytes()))
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

"""What the commands share: errors, progress, JSON. Heavy libraries are imported inside functions."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

BAD_INPUT = 2
WORDS = {"none": None, "true": True, "false": False}

stdout = Console(soft_wrap=True, highlight=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


class OneLineErrors(TyperGroup):
    """A command group that reports bad input, and failures to write, as one line on stderr and exits with code 2."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except typer.Abort:
            sys.exit(1)
        except Exception as error:
            from diffattn.files import CannotWrite

            if isinstance(error, CannotWrite):
                fail(str(error))
            if not hasattr(error, "format_message"):  # not raised by typer: a bug, so keep its traceback
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message())  # type: ignore[attr-defined]
                sys.exit(BAD_INPUT)
            fail(_message(error))
        sys.exit(code if isinstance(code, int) else 0)


def _message(error: Any) -> str:
    """The message of a typer error, with the offending value."""
    details = getattr(error.__cause__, "errors", list)()
    value = f": {details[0]['input']!r}" if details else ""
    return error.format_message() + value


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print("diffattn:", " ".join(message.split()), file=sys.stderr)
    sys.exit(BAD_INPUT)


@contextmanager
def bad_input(*errors: type[Exception]) -> Iterator[None]:
    """Turn the library's errors about its arguments into `fail`; only for the steps before the actual work.

    Args:
        errors: exception types to catch; by default ValueError and TypeError.
    """
    kinds = errors or (ValueError, TypeError)
    try:
        yield
    except kinds as error:
        fail(str(error))


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Show one status line while a model loads, instead of the libraries' own progress bars and log lines."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with stderr.status(f"loading {what}"):
            yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; yields a function that advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def show_warning(message: Warning | str, *where: Any) -> None:
    """Print a warning as one line on stderr, without its source location; for `warnings.showwarning`."""
    print("diffattn: warning:", " ".join(str(message).split()), file=sys.stderr)


def check_writable(path: Path | None, folder: bool = False) -> None:
    """Fail early if the result could not be written later; missing folders are not an error."""
    if path is None:
        return
    try:
        _check_place(path, folder)
    except OSError as error:  # for example a name that is too long
        fail(f"cannot write to {str(path)!r}: {error.strerror}")


def _check_place(path: Path, folder: bool) -> None:
    place = path if folder else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        fail(f"cannot write to {str(path)!r}: {str(place)!r} is not a folder")
    if not folder and path.is_dir():
        fail(f"cannot write to {str(path)!r}: it is a folder")
    if not all(os.access(there, os.W_OK) for there in (place, path) if there.exists()):
        fail(f"cannot write to {str(path)!r}: no permission")


def check_apart(file: Path | None, *others: Path | None) -> None:
    """Fail early if a file has the path of another output, or of a folder that is made for it."""
    for other in others:
        if file is None or other is None:
            continue
        mine, theirs = file.absolute(), other.absolute()
        if mine == theirs or mine in theirs.parents:
            fail(f"cannot write to {str(file)!r}: that is the place of another output, {str(other)!r}")


def check_outputs(json: Path | None, out: Path | None, *, folder: bool = False) -> None:
    """Fail early if one of a command's two outputs cannot be written, or if they are in one place.

    Args:
        json: the file of the results.
        out: the main output.
        folder: whether `out` is a folder.
    """
    check_writable(out, folder=folder)
    check_writable(json)
    check_apart(json, out)


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results if a file was given, creating its folder; a failure leaves an older file untouched."""
    if path is not None:
        from diffattn.files import write_whole

        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_options(pairs: list[str]) -> dict[str, Any]:
    """Parse `key=value`; a value that is not JSON is kept as a string."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--option {pair!r} is not of the form key=value")
        try:
            found[key] = WORDS[value.lower()] if value.lower() in WORDS else json.loads(value)
        except ValueError:
            found[key] = value
    return found

"""Every file below a folder, once: links are followed, except to files already included."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Found:
    """Everything below a folder, by its path from there with forward slashes."""

    sizes: dict[str, int] = field(default_factory=dict)
    """File -> bytes; -1 for a link whose target does not exist, which is an unreadable picture."""
    folders: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    """Links to files and folders that are also elsewhere here, or to a folder around them."""


def walk(root: Path) -> Found:
    """The files below a folder except hidden ones, each once and under its real path.

    Everything below the folder itself has the path that leads there without links. A link is followed if it leads to
    something not yet included; of several links to the same target only the first by name is followed, those to folders
    before those to files. A link to a folder around itself, or around `root`, would be circular and is not followed.

    Args:
        root: an absolute path without links.

    Raises:
        ValueError: a folder cannot be listed.
    """
    found, seen = Found(), {str(root)}
    links = _enter(root, "", found, seen)
    while links:
        waiting: list[tuple[str, Path]] = []
        for name, path in sorted(links, key=lambda link: (not link[1].is_dir(), link[0])):
            waiting += _follow(root, name, path, found, seen)
        links = waiting
    return found


def is_wanted(name: str) -> bool:
    """Whether a file or folder counts, i.e. is neither hidden nor macOS metadata."""
    return not name.startswith(".") and name != "__MACOSX"


def _enter(folder: Path, base: str, found: Found, seen: set[str]) -> list[tuple[str, Path]]:
    """Collect everything below a folder without following links, which are returned with their names."""
    links = []
    for here, inner, files in os.walk(folder, onerror=_refuse):
        below = Path(here).relative_to(folder).as_posix()
        prefix = base + ("" if below == "." else below + "/")
        linked = [name for name in inner if is_wanted(name) and (Path(here) / name).is_symlink()]
        inner[:] = [name for name in inner if is_wanted(name) and name not in linked and _first(here, name, seen)]
        found.folders.update(prefix + name for name in inner)
        for name in filter(is_wanted, files):
            status = Path(here, name).lstat()
            if stat.S_ISLNK(status.st_mode):
                linked.append(name)
            elif base == "" or _first(here, name, seen):
                found.sizes[prefix + name] = status.st_size
        links += [(prefix + name, Path(here) / name) for name in linked]
    return links


def _first(here: str, name: str, seen: set[str]) -> bool:
    """Whether a file or folder is met for the first time; it then counts as seen."""
    path = str(Path(here, name))
    return path not in seen and not seen.add(path)


def _follow(root: Path, name: str, link: Path, found: Found, seen: set[str]) -> list[tuple[str, Path]]:
    """Collect the target of a link if it is new; returns the links below it."""
    target = Path(os.path.realpath(link))
    if not _exists(target):
        found.sizes[name] = -1
        return []
    inside = target.relative_to(root).as_posix() if target.is_relative_to(root) else None
    around = root.is_relative_to(target) or link.parent.is_relative_to(target)
    if around or str(target) in seen or inside in found.sizes:
        found.repeated.add(name)
        return []
    seen.add(str(target))
    if target.is_dir():
        found.folders.add(name)
        return _enter(target, name + "/", found, seen)
    found.sizes[name] = target.stat().st_size
    return []


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:  # also where a folder on the way may not be entered
        return False
    return True


def _refuse(error: OSError) -> None:
    raise ValueError(f"cannot list the folder {error.filename!r}: {error.strerror}")

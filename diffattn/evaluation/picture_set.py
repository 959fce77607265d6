"""Sets of pictures to evaluate: a folder, a zip or an ADM `.npz`, in their own size.

Shapes: N pictures of height H and width W.
"""

import copy
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffattn.data.decoding import left_out, open_picture, pixels_of, square
from diffattn.data.files import Files, open_files
from diffattn.data.layouts import picture_rows
from diffattn.data.matching import Matching, match
from diffattn.data.naming import few, plural
from diffattn.data.opening import warn_of_left_out
from diffattn.data.order import natural_key, stratified
from diffattn.metrics.adm import read_pictures

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""`progress(what, total)` is a context manager; it gives a function that advances the progress by one."""


@contextmanager
def no_progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A `ProgressBar` that shows nothing."""
    yield lambda: None


class Listed(NamedTuple):
    """Pictures of a source, none of them read yet."""

    name: str  # for messages
    names: tuple[str, ...]
    read: Callable[[int], Tensor]  # index in `names` -> uint8 [3, H, W]; OSError or ValueError if it is unreadable
    places: bool = False  # whether the names are only positions, as in an array


class PictureSet:
    """Readable pictures of one size.

    Attributes:
        name: for messages.
        listed: names of all pictures of the source, in their order.
        names: names of the pictures that belong to the set.
        rows: the index of each of them in `listed`.
        places: whether the names are only positions, as in an array.
        size: (H, W) in pixels.
        hash: sha256 of the sizes and values of the pictures, computed as by `Reference.of`.
        skipped: names of the unreadable pictures that were left out.
    """

    def __init__(
        self,
        listed: Listed,
        *,
        side: int | None = None,
        limit: int | None = None,
        spread: bool = False,
        skip_bad: bool = False,
        leave_out: Collection[int] = (),
        progress: ProgressBar = no_progress,
    ) -> None:
        """Reads every picture once, to find the unreadable ones, the size and the hash.

        Args:
            listed: the pictures.
            side: crop every picture around its centre to a square, and resize it to this many pixels a side.
            limit: take only this many readable pictures. Every folder has its share, of which the first are taken.
            spread: take that share from all over the folder.
            skip_bad: leave unreadable pictures out, with a warning that counts and names them.
            leave_out: indices in `listed.names` that are not read.
            progress: see `ProgressBar`.

        Raises:
            ValueError: a side below 1 or a limit below 2; fewer than 2 readable pictures, or fewer than `limit`;
                unreadable ones without `skip_bad`; pictures of several sizes.
        """
        if side is not None and side < 1:
            raise ValueError(f"size must be 1 pixel or more, got {side}")
        if limit is not None and limit < 2:
            raise ValueError(f"the number of pictures must be 2 or more, got {limit}")
        self.name, self.listed, self._read, self.places = listed
        self._side, self._limit, self._skip_bad = side, limit, skip_bad
        self._take([row for row in range(len(self.listed)) if row not in leave_out], spread, progress)
        if len(self) < max(2, limit or 2):
            raise ValueError(f"at least {max(2, limit or 2)} pictures are needed, {self.name!r} has {len(self)}")
        self._check_sizes()
        self.size = next(iter(self._shapes))

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, positions: Collection[int]) -> "PictureSet":
        """The same pictures except those at these positions, counted from 0; the hash remains that of all."""
        found = copy.copy(self)
        kept = [i for i in range(len(self)) if i not in positions]
        found.rows, found.names = (tuple(values[i] for i in kept) for values in (self.rows, self.names))
        return found

    def batch(self, start: int, stop: int) -> Tensor:
        """Pictures `start` to `stop`, uint8 [stop - start, 3, H, W]."""
        return torch.stack([self._fitted(row) for row in self.rows[start:stop]])

    def partners_of(self, names: Sequence[str], rows: Sequence[int], places: bool) -> tuple["PictureSet", Matching]:
        """The partners of the pictures of another set, in their order, and how they were matched, see `match`.

        Args:
            names: all of the other set.
            rows: those of them that are taken.
            places: whether these names are only positions.

        Raises:
            ValueError: the sets do not pair, or pictures are left out on one side only; the message names pictures.
        """
        matching = match(names, self.listed, places or self.places)
        wanted = [matching.partners[row] for row in rows]
        found = copy.copy(self)
        if set(wanted) != set(self.rows) and self._limit is not None:
            found._limit = None
            found._take(sorted(wanted), False, no_progress)
            found._shapes = {**self._shapes, **found._shapes}
            found._check_sizes()
        if one_side := set(wanted) ^ set(found.rows):
            names = few([self.listed[row] for row in sorted(one_side)])
            raise ValueError(f"pictures are left out on one side only, in {self.name!r} {names}: they do not pair")
        found.rows, found.names = tuple(wanted), tuple(self.listed[row] for row in wanted)
        if wanted != sorted(wanted):
            found.hash = hashlib.sha256(f"{found.hash} {wanted}".encode()).hexdigest()
        return found, matching

    def _take(self, rows: Sequence[int], spread: bool, progress: ProgressBar) -> None:
        """Read these rows, or as many of them as the limit allows, and record the result."""
        bad: dict[int, str] = {}
        while True:
            left = [row for row in rows if row not in bad]
            if self._limit is not None:
                picked = stratified([self.listed[row] for row in left], self._limit, spread)
                left = [left[i] for i in picked]
            worse = self._read_all(left, progress)
            bad |= worse
            if not worse or self._limit is None or not self._skip_bad:
                break  # else others take the place of the unreadable ones
        self.rows = tuple(row for row in left if row not in bad)
        self.names, self.skipped = tuple(self.listed[row] for row in self.rows), tuple(self.listed[row] for row in bad)
        self.hash = self._digest.hexdigest()
        if bad:
            count = f"{len(bad)} of {len(self.listed)} pictures in {self.name!r} cannot be read"
            if not self._skip_bad:
                first = next(iter(bad.values()))
                raise ValueError(
                    f"{count}: {few(self.skipped)} (the first: {first}); leave them out with skip_bad (--skip-bad)"
                )
            warnings.warn(f"{count} and are left out: {few(self.skipped)}", stacklevel=4)

    def _read_all(self, rows: Sequence[int], progress: ProgressBar) -> dict[int, str]:
        """Shapes and digest of these pictures; the rows of the unreadable ones, each with the reason."""
        bad: dict[int, str] = {}
        self._shapes, self._digest = {}, hashlib.sha256()
        with progress(f"reading {self.name}", len(rows)) as advance:
            for row in rows:
                try:
                    self._note(self._fitted(row), self.listed[row])
                except (OSError, ValueError) as error:
                    bad[row] = str(error)
                advance()
        return bad

    def _check_sizes(self) -> None:
        if len(self._shapes) > 1:
            sizes = ", ".join(f"{w}x{h} ({label!r})" for (h, w), label in list(self._shapes.items())[:3])
            raise ValueError(f"pictures in {self.name!r} have several sizes: {sizes}; bring them to one with size")

    def _fitted(self, index: int) -> Tensor:
        picture = self._read(index)
        return picture if self._side is None else fit(picture, self._side)

    def _note(self, picture: Tensor, label: str) -> None:
        self._shapes.setdefault((picture.shape[1], picture.shape[2]), label)
        self._digest.update(str(tuple(picture.shape)).encode())
        self._digest.update(picture.contiguous().numpy().tobytes())


def open_pictures(
    source: str | Path,
    *,
    side: int | None = None,
    limit: int | None = None,
    spread: bool = False,
    skip_bad: bool = False,
    progress: ProgressBar = no_progress,
) -> PictureSet:
    """The pictures of a folder or zip, or of an ADM `.npz`.

    In a folder or zip all files count that Pillow can open, in any layout, except hidden ones. They come in natural
    order: "2.png" precedes "10.png". Files that may be pictures of another kind are left out with a warning that counts
    and names them. Each file counts once, whatever links lead to it.

    Args and raises: as `PictureSet`; `ValueError` also for a source that is none of these.
    """
    path = Path(source)
    if path.suffix.lower() == ".npz":
        pictures = read_pictures(path)
        names = tuple(f"arr_0[{i}]" for i in range(len(pictures)))
        listed = Listed(path.name, names, pictures.__getitem__, places=True)
    else:
        files = open_files(path)
        rows = sorted(picture_rows(files), key=lambda row: natural_key(files.names[row]))
        listed = Listed(path.name, tuple(files.names[row] for row in rows), _reader(files, rows))
        warn_of_left_out(str(path), left_out(files.names))
        if files.repeated:
            warnings.warn(
                f"{plural(len(files.repeated), 'link')} in {str(path)!r} left out, since each picture counts once: "
                + few(files.repeated),
                stacklevel=2,
            )
    return PictureSet(listed, side=side, limit=limit, spread=spread, skip_bad=skip_bad, progress=progress)


def fit(picture: Tensor, side: int) -> Tensor:
    """uint8 [3, H, W] -> [3, side, side]: the centre square, resized with PIL's bicubic filter (antialiased)."""
    if picture.shape[1:] == (side, side):
        return picture
    return pixels_of(square(Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()), side))


def _reader(files: Files, rows: Sequence[int]) -> Callable[[int], Tensor]:
    def read(index: int) -> Tensor:
        return pixels_of(open_picture(files.read(rows[index])))

    return read

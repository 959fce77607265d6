"""Sets of pictures to evaluate: a folder, a zip or an ADM `.npz`, in their own size.

Shapes: N pictures of height H and width W.
"""

import copy
import hashlib
import io
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffattn.data import decoding
from diffattn.data.files import Files, open_files
from diffattn.data.layouts import few, is_picture
from diffattn.metrics.adm import read_pictures

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""`progress(what, total)` gives a context with the function that advances by one."""


@contextmanager
def no_progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows nothing."""
    yield lambda: None


class PictureSet:
    """Readable pictures of one size.

    Attributes:
        name: for people.
        names: of the pictures, in their order.
        rows: where each stands among all, the unreadable ones too.
        size: (H, W) in pixels.
        hash: sha256 of sizes and values of all pictures, as `Reference.of` has it.
        skipped: names of the unreadable pictures that were left out.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        read: Callable[[int], Tensor],
        *,
        side: int | None = None,
        limit: int | None = None,
        skip_bad: bool = False,
        leave_out: Collection[int] = (),
        progress: Progress = no_progress,
    ) -> None:
        """Reads every picture once, to find the unreadable ones, the size and the hash.

        Args:
            name: for people.
            names: of the pictures.
            read: index in `names` -> uint8 [3, H, W]; raises `OSError` or `ValueError` for an unreadable picture.
            side: bring every picture to this size: cropped around the centre to a square, resized bicubically.
            limit: the first so many readable pictures only.
            skip_bad: leave unreadable pictures out, with a warning that counts and names them.
            leave_out: indices in `names` that are not read.
            progress: see `Progress`.

        Raises:
            ValueError: a size below 1 or a limit below 2; fewer than 2 readable pictures or than `limit`; unreadable
                ones without `skip_bad`; pictures of several sizes.
        """
        if side is not None and side < 1:
            raise ValueError(f"size must be 1 pixel or more, got {side}")
        if limit is not None and limit < 2:
            raise ValueError(f"the number of pictures must be 2 or more, got {limit}")
        self.name, self._read, self._side = name, read, side
        good, self._shapes, self._digest = [], {}, hashlib.sha256()
        bad: dict[str, str] = {}
        with progress(f"reading {name}", len(names) if limit is None else limit) as advance:
            for index, label in enumerate(names):
                if limit is not None and len(good) == limit:
                    break
                if index in leave_out:
                    continue
                try:
                    self._note(self._fitted(index), label)
                    good.append(index)
                except (OSError, ValueError) as error:
                    bad[label] = str(error)
                advance()
        self.rows, self.names = tuple(good), tuple(names[i] for i in good)
        self.skipped, self.hash = tuple(bad), self._digest.hexdigest()
        self._check(bad, len(names), skip_bad, limit)
        self.size = next(iter(self._shapes))

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, rows: Collection[int]) -> "PictureSet":
        """The same pictures but for these rows; the hash stays that of all."""
        found = copy.copy(self)
        kept = [i for i, row in enumerate(self.rows) if row not in rows]
        found.rows, found.names = (tuple(values[i] for i in kept) for values in (self.rows, self.names))
        return found

    def batch(self, start: int, stop: int) -> Tensor:
        """Pictures `start` to `stop`, uint8 [stop - start, 3, H, W]."""
        return torch.stack([self._fitted(row) for row in self.rows[start:stop]])

    def _fitted(self, index: int) -> Tensor:
        picture = self._read(index)
        return picture if self._side is None else fit(picture, self._side)

    def _note(self, picture: Tensor, label: str) -> None:
        self._shapes.setdefault((picture.shape[1], picture.shape[2]), label)
        self._digest.update(str(tuple(picture.shape)).encode())
        self._digest.update(picture.contiguous().numpy().tobytes())

    def _check(self, bad: dict[str, str], total: int, skip_bad: bool, limit: int | None) -> None:
        if bad:
            count = f"{len(bad)} of {total} pictures in {self.name!r} cannot be read"
            if not skip_bad:
                raise ValueError(f"{count}: {few(tuple(bad))} (the first: {next(iter(bad.values()))}); leave them out "
                                 "with skip_bad (--skip-bad)")  # fmt: skip
            warnings.warn(f"{count} and are left out: {few(tuple(bad))}", stacklevel=4)
        if len(self) < max(2, limit or 2):
            raise ValueError(f"{max(2, limit or 2)} pictures or more are needed, {self.name!r} has {len(self)}")
        if len(self._shapes) > 1:
            sizes = ", ".join(f"{w}x{h} ({label!r})" for (h, w), label in list(self._shapes.items())[:3])
            raise ValueError(f"pictures in {self.name!r} have several sizes: {sizes}; bring them to one with size")


def open_pictures(
    source: str | Path,
    *,
    side: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    progress: Progress = no_progress,
) -> PictureSet:
    """The pictures of a folder or zip (any layout; hidden files left out), or of an ADM `.npz`, ordered by name.

    Args and raises: as `PictureSet`; `ValueError` also for a source that is none of these.
    """
    path = Path(source)
    if path.suffix == ".npz":
        pictures = read_pictures(path)
        names = [f"arr_0[{i}]" for i in range(len(pictures))]
        read: Callable[[int], Tensor] = pictures.__getitem__
    else:
        files = open_files(path)
        rows = [row for row, name in enumerate(files.names) if is_picture(name)]
        if not rows:
            raise ValueError(f"no pictures in {str(path)!r}")
        names = [files.names[row] for row in rows]
        read = _reader(files, rows)
    return PictureSet(path.name, names, read, side=side, limit=limit, skip_bad=skip_bad, progress=progress)


def fit(picture: Tensor, side: int) -> Tensor:
    """uint8 [3, H, W] -> [3, side, side]: the centre square, resized with PIL's bicubic filter (antialiased)."""
    if picture.shape[1:] == (side, side):
        return picture
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return decoding.decode(buffer.getvalue(), side)


def _reader(files: Files, rows: Sequence[int]) -> Callable[[int], Tensor]:
    def read(index: int) -> Tensor:
        data = files.read(rows[index])
        try:
            with Image.open(io.BytesIO(data)) as file:
                image = decoding._rgb(file)
        except Exception as error:  # damaged files make the decoders raise nearly anything
            raise ValueError(str(error) or type(error).__name__) from error
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()

    return read

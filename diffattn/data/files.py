"""Sources of the pictures' bytes: a folder or a zip. Both can be pickled and read from forked processes and threads."""

import mmap
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from diffattn.data.walking import is_wanted, walk

UNCOMPRESSED = (".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".tga")
"""Pictures whose sizes do not follow from what they show."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_SIGNATURE = b"PK\3\4"


class Files(Protocol):
    """Named byte strings."""

    where: str
    """The name of the source in messages."""
    names: tuple[str, ...]
    """Paths with forward slashes, in ascending order, without hidden files."""
    folders: tuple[str, ...]
    """Every folder, empty ones too, as in `names`."""
    repeated: tuple[str, ...]
    """Links that were not followed: in a folder those to files that are already among the names, in a zip all."""

    def read(self, row: int) -> bytes:
        """The content of `names[row]`; `OSError` or `ValueError` if it cannot be read."""
        ...

    def signatures(self, rows: Tensor) -> list[str]:
        """What distinguishes two versions of a file, for each of the rows, int64 [n]; most are not read for it."""
        ...


def open_files(path: Path) -> Files:
    """The files of a folder or zip.

    Raises:
        ValueError: neither; a truncated or damaged zip; one with encrypted entries or another compression than deflate.
    """
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise ValueError(f"{str(path)!r} does not exist")
    if path.is_file() and zipfile.is_zipfile(path):
        return Zip(path)
    raise ValueError(f"{str(path)!r} {_what_it_is(path)}")


class Folder:
    """The files below a folder. Links are followed; each file is there once, see `walk`."""

    def __init__(self, path: Path) -> None:
        """Raises `ValueError` if a folder cannot be listed."""
        self.path, self.where = path.resolve(), str(path)
        found = walk(self.path)
        self.names: tuple[str, ...] = tuple(sorted(found.sizes))
        self.folders: tuple[str, ...] = tuple(sorted(found.folders))
        self.repeated: tuple[str, ...] = tuple(sorted(found.repeated))
        self.sizes = torch.tensor([found.sizes[name] for name in self.names], dtype=torch.int64)

    def read(self, row: int) -> bytes:
        return (self.path / self.names[row]).read_bytes()

    def signatures(self, rows: Tensor) -> list[str]:
        """The sizes, and of uncompressed pictures their checksums too."""
        found = []
        for row, size in zip(rows.tolist(), self.sizes[rows].tolist(), strict=True):
            checked = self.names[row].lower().endswith(UNCOMPRESSED)
            found.append(f"{size} {zlib.crc32(self._read_if_there(row))}" if checked else str(size))
        return found

    def _read_if_there(self, row: int) -> bytes:
        try:
            return self.read(row)
        except OSError:
            return b""  # reported when the picture is decoded


class Zip:
    """The files in a zip, stored or deflated.

    The directory is kept as one tensor and the archive as a memory map, so that a data set of a million pictures
    costs little in every loader process, and processes and threads share no file position.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.where = path.resolve(), str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [(_posix(entry.filename), entry) for entry in archive.infolist()]
        except Exception as error:  # damaged directories make zipfile raise nearly anything
            raise ValueError(f"{str(path)!r} is a damaged zip: {error or type(error).__name__}") from None
        files = {name: e for name, e in entries if not e.is_dir() and all(map(is_wanted, name.split("/")))}
        links = [name for name, e in files.items() if stat.S_ISLNK(e.external_attr >> 16)]
        self.repeated: tuple[str, ...] = tuple(sorted(links))
        files = {name: entry for name, entry in files.items() if name not in self.repeated}
        for name, entry in files.items():
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name!r} in {str(path)!r} is encrypted or not deflated; zip it anew")
        self.names = tuple(sorted(files))
        table = [
            (e.header_offset, e.compress_size, e.file_size, e.CRC, e.compress_type) for _, e in sorted(files.items())
        ]
        self.table = torch.tensor(table, dtype=torch.int64).view(-1, 5)
        kept = (name for name, _ in entries if all(map(is_wanted, name.rstrip("/").split("/"))))
        self.folders = tuple(sorted({folder for name in kept for folder in _folders_of(name)}))
        self._map: mmap.mmap | None = None

    def read(self, row: int) -> bytes:
        start, length, size, crc, method = self.table[row].tolist()
        archive = self._mapped()
        try:
            signature, name, extra = _LOCAL_HEADER.unpack(archive[start : start + _LOCAL_HEADER.size])
            start += _LOCAL_HEADER.size + name + extra
            data = archive[start : start + length]
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # no more than the zip says
        except (struct.error, zlib.error):
            signature = data = b""
        if signature != _SIGNATURE or len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("the zip is damaged, or was changed since it was opened")
        return data

    def signatures(self, rows: Tensor) -> list[str]:
        return [f"{size} {crc:08x}" for size, crc in self.table[rows, 2:4].tolist()]

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


def _what_it_is(path: Path) -> str:
    """A description of something that is neither a folder nor a complete zip."""
    if not path.is_file():
        return "is neither a folder nor a zip"
    with path.open("rb") as file:
        start = file.read(len(_SIGNATURE))
    if not start:
        return "is an empty file"
    if start == _SIGNATURE:
        return "is a truncated or damaged zip: it begins as one and has no directory at its end; copy it again"
    return "is neither a folder nor a zip"


def _posix(name: str) -> str:
    return name.replace("\\", "/").lstrip("/")


def _folders_of(name: str) -> list[str]:
    """The folders that a zip entry lies in, and the entry itself if it is one (it then ends in a slash)."""
    parents = [str(parent) for parent in PurePosixPath(name).parents if str(parent) != "."]
    return [*parents, name.rstrip("/")] if name.endswith("/") else parents

"""Decodes picture files to square tensors, and decides which files are pictures."""

import io
import re
from collections.abc import Iterable

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

COMMON = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Example file extensions for messages."""

NOT_DECODED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))
"""Formats that Pillow recognises but cannot decode, or only by running another program on the file.

They are never opened, whatever a file's ending.
"""

DOCUMENTS = frozenset(
    (
        ".cfg", ".csv", ".db", ".gz", ".htm", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".lock", ".log", ".md",
        ".npy", ".npz", ".parquet", ".pkl", ".pt", ".pth", ".py", ".rst", ".safetensors", ".sh", ".tar", ".toml",
        ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip",
    )
)  # fmt: skip
"""Endings of files that often accompany pictures but are not pictures."""


def picture_endings() -> frozenset[str]:
    """Endings of the files that this Pillow can open, plugins that are registered with it included; lower case."""
    Image.init()
    formats = Image.registered_extensions().items()
    readable = {ending for ending, kind in formats if kind in Image.OPEN and kind not in NOT_DECODED}
    return frozenset({*readable, ".mpo"})  # which Pillow opens as a JPEG


def ending_of(name: str) -> str:
    """The ending of a file name with its dot, in lower case; empty without one."""
    file = name[name.rfind("/") + 1 :]
    dot = file.rfind(".")
    return file[dot:].lower() if dot > 0 else ""


def may_be_picture(name: str) -> bool:
    """Whether a file that cannot be opened may be a picture: by its ending or name it is not a document."""
    file = name[name.rfind("/") + 1 :]
    return ending_of(name) not in DOCUMENTS and not (file.isalpha() and file.isupper())  # e.g. LICENSE


def left_out(names: Iterable[str]) -> tuple[str, ...]:
    """The files that may be pictures, but of a kind that cannot be opened."""
    endings = picture_endings()
    return tuple(name for name in names if ending_of(name) not in endings and may_be_picture(name))


def open_picture(data: bytes) -> Image.Image:
    """A picture as RGB, in its own size.

    The camera's rotation is undone, transparency is blended with white, an animation gives its first frame, and 16-bit
    grey is reduced to 8 bits.

    Raises:
        ValueError: unreadable; the message gives the reason.
    """
    if not data:
        raise ValueError("the file is empty")
    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[kind for kind in Image.ID if kind not in NOT_DECODED]) as file:
            return _rgb(file)
    except UnidentifiedImageError:
        raise ValueError("its content is not a picture in a format that can be opened here") from None
    except Exception as error:  # damaged files make the decoders raise nearly anything
        reason = re.sub(r"\s*<_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error) or type(error).__name__)
        raise ValueError(reason.replace("\n", " ")) from error


def decode(data: bytes, size: int) -> Tensor:
    """A picture as RGB, uint8 [3, size, size], read as by `open_picture`.

    A picture of another size is cropped to its centre square and resized with PIL's bicubic filter, which widens with
    the reduction and so does not alias.

    Raises:
        ValueError: unreadable; the message gives the reason.
    """
    return pixels_of(square(open_picture(data), size))


def square(picture: Image.Image, size: int) -> Image.Image:
    """The square around the centre of a picture, `size` pixels a side."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    if picture.size != (side, side):
        picture = picture.crop((left, top, left + side, top + side))
    return picture if side == size else picture.resize((size, size), Image.Resampling.BICUBIC)


def pixels_of(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("F", "I"):
        raise ValueError("pictures of 32-bit numbers have no known range; save them with 8 bits")
    if picture.mode.startswith("I;16"):
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    ImageOps.exif_transpose(picture, in_place=True)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")

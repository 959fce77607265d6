"""From the bytes of a picture file to a square tensor."""

import io

import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""What is taken for a picture; other files are passed over."""


def decode(data: bytes, size: int) -> Tensor:
    """A picture as RGB, uint8 [3, size, size].

    The camera's rotation is undone, transparency lies over white, of an animation the first frame is taken, and
    16-bit grey is reduced to 8. A picture of another size is cropped around its centre to a square, and that resized
    with PIL's bicubic filter, which widens with the reduction and so does not alias.

    Raises:
        ValueError: unreadable, with the decoder's reason.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            picture = _rgb(file)
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise ValueError(f"{error or type(error).__name__}".replace("\n", " ")) from error
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    if picture.size != (side, side):
        picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1).contiguous()


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

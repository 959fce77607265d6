"""Sheets of pictures with labelled rows and columns, and differences amplified to be visible."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 8  # pixels between pictures
INK, PAPER = (30, 30, 30), (255, 255, 255)
BARS = ((150, 150, 150), (230, 120, 20))


FACTORS = (1, 2, 5, 10, 20, 50, 100)
"""Factors for differences; round numbers, so that they are easy to read on a sheet."""

CLIPPED = 0.005  # share of the values that may be clipped to white


def amplified(a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """The absolute difference of pictures, brightened to be visible.

    Args:
        a, b: pictures [B, c, H, W] in 0..1; all get the same factor, so that they can be compared.

    Returns:
        The difference times the factor in 0..1, and the factor: the largest of `FACTORS` that clips no more than
        `CLIPPED` of the values; 1 for identical pictures.
    """
    difference = (a - b).abs()
    count = difference.numel()
    high = difference.flatten().kthvalue(max(1, round(count * (1 - CLIPPED)))).values.item()
    high = high or difference.max().item()  # where nearly all of it is 0
    factor = max((f for f in FACTORS if f * high <= 1), default=1) if high else 1
    return (factor * difference).clamp(max=1), factor


def comparison_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """Combine many pictures into one grid.

    Args:
        rows: label and pictures of every row, one picture per column; all pictures of one size.
        columns: label of every column; long ones are wrapped.

    Returns:
        RGB, labels left and above.

    Raises:
        ValueError: no pictures, a row whose length differs from `columns`, or pictures of different sizes.
    """
    sizes = {picture.size for _, pictures in rows for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"a sheet needs pictures of one size, got {sorted(sizes)}")
    for label, pictures in rows:
        if len(pictures) != len(columns):
            raise ValueError(f"row {label!r} has {len(pictures)} pictures for {len(columns)} columns")
    width, height = sizes.pop()
    font = ImageFont.load_default(size=max(12, width // 14))
    heads = [_wrap(label, font, width) for label in columns]
    sides = [_wrap(label, font, max(96, width * 2 // 3)) for label, _ in rows]
    left = GAP + max(int(_width(line, font)) for lines in sides for line in lines) + GAP
    top = GAP + max(len(lines) for lines in heads) * _line_height(font) + GAP
    sheet = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, lines in enumerate(heads):
        draw.text((left + i * (width + GAP) + width // 2, top - GAP), "\n".join(lines), INK, font, anchor="md")
    for j, ((_, pictures), lines) in enumerate(zip(rows, sides, strict=True)):
        y = top + j * (height + GAP)
        draw.text((GAP, y + height // 2), "\n".join(lines), INK, font, anchor="lm")
        for i, picture in enumerate(pictures):
            sheet.paste(picture.convert("RGB"), (left + i * (width + GAP), y))
    return sheet


def with_time_bars(sheet: Image.Image, seconds: Mapping[str, float]) -> Image.Image:
    """A sheet with one bar per name below it, its length proportional to the time, and the seconds in large type."""
    font = ImageFont.load_default(size=max(14, sheet.width // 64))
    line, left = _line_height(font), GAP + max(int(_width(name, font)) for name in seconds) + 2 * GAP
    row = 2 * line
    whole = Image.new("RGB", (sheet.width, sheet.height + row * len(seconds) + GAP), PAPER)
    whole.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(whole)
    longest, room = max(seconds.values()), sheet.width - left - GAP - int(_width("000.00 s", font))
    for i, (name, value) in enumerate(seconds.items()):
        y, end = sheet.height + i * row, left + max(int(room * value / longest), 1)
        draw.text((GAP, y + row // 2), name, INK, font, anchor="lm")
        draw.rectangle((left, y + line // 2, end, y + row - line // 2), fill=BARS[i % len(BARS)])
        draw.text((end + GAP, y + row // 2), f"{value:.2f} s", INK, font, anchor="lm")
    return whole


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of whole words, each within `width` pixels unless a single word is longer."""
    lines: list[str] = []
    for word in text.split() or [""]:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    return font.getlength(text)


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    _, top, _, bottom = font.getbbox("Ag")
    return int((bottom - top) * 1.5)

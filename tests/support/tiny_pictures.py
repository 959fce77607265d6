"""Tiny data sets in every layout, created in a moment."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

Content = Mapping[str, bytes]
"""File name -> bytes."""


def png(value: int, size: int | tuple[int, int] = 8) -> bytes:
    """Random colours that follow from `value`."""
    width, height = (size, size) if isinstance(size, int) else size
    pixels = torch.randint(
        0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(value)
    )
    return encoded(Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())))


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def class_folders(counts: Mapping[str, int]) -> dict[str, bytes]:
    """Pictures `class/0.png`, … of each class; all of them different."""
    names = [f"{folder}/{i}.png" for folder, count in counts.items() for i in range(count)]
    return {name: png(value) for value, name in enumerate(names)}


def as_json(content: object) -> bytes:
    return json.dumps(content).encode()


def as_lines(*lines: Mapping[str, object]) -> bytes:
    return "\n".join(map(json.dumps, lines)).encode()


def captioned(names: Sequence[str], size: int) -> dict[str, bytes]:
    """A picture per name, and the `metadata.jsonl` that names them; the layout that the training programs read."""
    rows = [{"file_name": f"{i}.png", "text": name} for i, name in enumerate(names)]
    pictures = {str(row["file_name"]): png(i, size) for i, row in enumerate(rows)}
    return {**pictures, "metadata.jsonl": as_lines(*rows)}


def folder(path: Path, content: Content) -> Path:
    path.mkdir()
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def packed(path: Path, content: Content, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path

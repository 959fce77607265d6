"""Files from elsewhere: endings, damaged and hostile pictures, truncated zips, indexes that contradict themselves."""

import io
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_pictures import as_json, as_lines, class_folders, encoded, folder, packed, png

from diffattn.data import check_balance, open_dataset
from diffattn.data.decoding import decode, picture_endings
from diffattn.evaluation.picture_set import open_pictures

ENDINGS = {
    ".png": "PNG", ".PNG": "PNG", ".jpg": "JPEG", ".JPEG": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".webp": "WEBP",
    ".avif": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP",
    ".gif": "GIF", ".ppm": "PPM", ".pgm": "PPM", ".tga": "TGA", ".ico": "ICO", ".pcx": "PCX", ".qoi": "QOI",
    ".mpo": "JPEG",
}  # fmt: skip
"""Ending -> format that Pillow writes."""


def picture(size: int = 16) -> Image.Image:
    return Image.open(io.BytesIO(png(3, size)))


def test_every_kind_that_pillow_opens_is_used(tmp_path: Path) -> None:
    Image.init()
    known = {ending: kind for ending, kind in ENDINGS.items() if kind in Image.SAVE}
    content = {f"cat/{i}{ending}": encoded(picture(), kind) for i, (ending, kind) in enumerate(known.items())}
    data = folder(tmp_path / "data", content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = open_dataset(data, 16)
        assert dataset.class_counts() == {"cat": len(known)}
        assert len([dataset[i] for i in range(len(dataset))]) == len(known)
        assert len(open_pictures(data)) == len(known)


def test_what_cannot_be_opened_is_counted_and_named(tmp_path: Path) -> None:
    more = {"cat/a.heic": b"x", "dog/b.JXL": b"x", "dog/IMG_0001": b"x", "dog/a.txt": b"x", "LICENSE": b"x"}
    data = folder(tmp_path / "data", class_folders({"cat": 2, "dog": 2}) | more)
    said = (
        r"3 files in '.*data' of a kind that Pillow cannot open here, left out: 'cat/a.heic', 'dog/IMG_0001', 'dog/b.J"
    )
    with pytest.warns(UserWarning, match=said):
        assert len(open_dataset(data, 8)) == 4
    with pytest.warns(UserWarning, match=said):
        assert len(open_pictures(data)) == 4


def test_a_class_of_other_kinds_is_named_as_empty(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", class_folders({"cat": 2, "dog": 2}) | {"emu/a.heic": b"x", "emu/b.heic": b"x"})
    with pytest.warns(UserWarning, match=r"'emu/a.heic', 'emu/b.heic'"):
        dataset = open_dataset(data, 8)
    with pytest.raises(ValueError, match="classes without pictures: 'emu'"):
        check_balance(dataset)


def test_only_other_kinds(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", {"a.heic": b"x", "b.svg": b"x"})
    for read in (lambda: open_dataset(data, 8), lambda: open_pictures(data)):
        with pytest.raises(ValueError, match=r"no pictures in .*; there are 2 files of other kinds: 'a.heic', 'b.svg'"):
            read()


def test_formats_that_run_programs_or_cannot_be_decoded_are_not_opened() -> None:
    assert not {".eps", ".ps", ".h5", ".hdf", ".mpg", ".wmf", ".grib", ".pdf"} & picture_endings()
    postscript = encoded(picture(), "EPS")
    with pytest.raises(ValueError, match="its content is not a picture in a format that can be opened here"):
        decode(postscript, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "^the file is empty$"),
        (b"no picture", "^its content is not a picture in a format that can be opened here$"),
        (png(0)[:60], "."),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "pictures of 32-bit numbers have no known range"),
    ],
)
def test_no_address_in_memory_is_shown(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as found:
        decode(data, 8)
    assert "BytesIO" not in str(found.value)
    bad = folder(tmp_path / "data", {"a.png": data, "b.png": png(0), "c.png": png(1)})
    with pytest.raises(ValueError, match=r"'a.png' \(the first: ") as shown:
        open_pictures(bad)
    assert "BytesIO" not in str(shown.value)


def test_a_decompression_bomb_is_refused() -> None:
    size = 30_000
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="decompression bomb"):
        decode(bomb, 8)


def test_a_zip_that_says_less_than_it_holds_is_refused(tmp_path: Path) -> None:
    """Its entry would unpack to more than the directory says."""
    archive = packed(tmp_path / "data.zip", {"a/0.png": b"\0" * 5_000_000, "a/1.png": png(0)})
    data = archive.read_bytes().replace(struct.pack("<I", 5_000_000), struct.pack("<I", 100))
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="the zip is damaged"):
        open_dataset(archive, 8)[0]


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "L", "LA", "RGBA", "I;16", "YCbCr", "LAB"])
def test_every_mode_is_the_same_in_training_and_evaluation(tmp_path: Path, mode: str) -> None:
    kind = {"CMYK": "TIFF", "LAB": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    data = encoded(picture().convert("L").convert("I;16") if mode == "I;16" else picture().convert(mode), kind)
    source = folder(tmp_path / "data", {f"{i}.{kind.lower()}": data for i in range(2)})
    pixels = open_pictures(source).batch(0, 1)[0]
    assert pixels.shape == (3, 16, 16)
    assert np.array_equal(pixels, open_dataset(source, 16)[0][0])


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert decode(data, 1).flatten().tolist() == [255, 0, 0]


# Zips.


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_a_truncated_zip_is_called_so(tmp_path: Path, kept: float) -> None:
    archive = packed(tmp_path / "data.zip", class_folders({"cat": 5, "dog": 5}))
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * kept)])
    for read in (lambda: open_dataset(archive, 8), lambda: open_pictures(archive)):
        with pytest.raises(ValueError, match=r"data.zip' is a truncated or damaged zip"):
            read()


def test_an_empty_file_and_one_of_another_kind(tmp_path: Path) -> None:
    for content, message in ((b"", "is an empty file"), (b"text", "is neither a folder nor a zip")):
        (tmp_path / "data.zip").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path / "data.zip", 8)


def test_a_damaged_directory_of_a_zip(tmp_path: Path) -> None:
    archive = packed(tmp_path / "data.zip", class_folders({"cat": 2}), zipfile.ZIP_STORED)
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 1] = 0
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="is a damaged zip"):
        open_dataset(archive, 8)


# Indexes.

TWO = {"a.png": png(0), "b.png": png(1)}


@pytest.mark.parametrize("name", ["a.png", "./a.png"])
def test_a_picture_with_two_labels_is_refused(tmp_path: Path, name: str) -> None:
    labels = [["a.png", 0], ["b.png", 1], [name, 1]]
    data = folder(tmp_path / "data", TWO | {"dataset.json": as_json({"labels": labels})})
    with pytest.raises(ValueError, match=r"it names the picture 'a.png' twice, with the labels 0 and 1"):
        open_dataset(data, 8)
    lines = as_lines(*({"file_name": file, "label": str(value)} for file, value in labels))
    with pytest.raises(ValueError, match=r"it names the picture 'a.png' twice, with the labels '0' and '1'"):
        open_dataset(folder(tmp_path / "lines", TWO | {"metadata.jsonl": lines}), 8)


def test_a_picture_named_twice_with_one_label_is_used_once(tmp_path: Path) -> None:
    labels = [["a.png", 0], ["b.png", 1], ["a.png", 0]]
    data = folder(tmp_path / "data", TWO | {"dataset.json": as_json({"labels": labels})})
    with pytest.warns(UserWarning, match="named more than once, with the same label: 'a.png'"):
        assert open_dataset(data, 8).labels.tolist() == [0, 1]


CODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_captions_with_odd_characters(tmp_path: Path, coding: str, end: str, odd: str) -> None:
    escaped = odd if odd > " " else f"\\u{ord(odd):04x}"
    lines = [
        f'{{"file_name": "{name}", "text": "a{escaped}b", "label": "x{odd if odd > " " else ""}{name}"}}'
        for name in TWO
    ]
    content = TWO | {"metadata.jsonl": end.join([*lines, ""]).encode(coding)}
    assert len(open_dataset(folder(tmp_path / "jsonl", content), 8).class_names) == 2
    rows = ["file_name,text,label", *(f'{name},"a{odd}b, two{end}lines",x{name}' for name in TWO)]
    content = TWO | {"metadata.csv": end.join([*rows, ""]).encode(coding)}
    assert open_dataset(folder(tmp_path / "csv", content), 8).class_names == ("xa.png", "xb.png")
    content = TWO | {"dataset.json": f'{{"labels":{end}[["a.png", 1],{end}["b.png", 0]]}}'.encode(coding)}
    assert open_dataset(folder(tmp_path / "json", content), 8).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.jsonl",
            b'{"file_name": "a.png"}\n{"file_name": "b\xe9.png"}\n',
            "line 2 contains bytes .* not UTF-8",
        ),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n\n{oops\n', "line 3 is not JSON"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n'.encode("utf-16-le"), "line 1 contains a NUL character"),
        ("metadata.jsonl", b"[" * 100_000, "line 1 is not JSON: .* nested"),
        ("dataset.json", b'{"labels": ' + b"[" * 100_000, "nested more than"),
        ("metadata.csv", b'file_name,label\na.png,"x\n', "it is not CSV"),
        ("metadata.csv", b"file_name;label\na.png;x\n", "file_name; entry 1 has none, its columns are file_name;label"),
        ("metadata.csv", b"file_name,label\na.png,x,y\nb.png,z\n", "a row has more values than the header has columns"),
        ("metadata.csv", b"file_name,label,label\na.png,x,y\nb.png,z,z\n", "duplicate columns: 'label'"),
        ("metadata.csv", b"file_name,label\na.png," + b"x" * 200_000 + b"\n", "line 1 it is not CSV: field larger"),
    ],
)
def test_an_index_that_cannot_be_read_names_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' in .*: .*{message}"):
        open_dataset(folder(tmp_path / "data", TWO | {name: content}), 8, label=None)

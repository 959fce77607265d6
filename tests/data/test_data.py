"""Data sets to train on: layouts, splits, labels, decoding, unreadable pictures, fingerprints, memory, classes."""

import importlib.util
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_pictures import Content, as_json, as_lines, class_folders, encoded, folder, packed, png

from diffattn.data import ImageDataset, check_balance, check_classes, in_memory, open_dataset
from diffattn.data.decoding import decode

Store = Callable[[Content], Path]
CATS_AND_DOGS = class_folders({"cat": 2, "dog": 3})


@pytest.fixture(params=["folder", "zip"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Puts files into a folder, or into a zip."""
    if request.param == "folder":
        return lambda content: folder(tmp_path / "data", content)
    return lambda content: packed(tmp_path / "data.zip", content)


def names(dataset: ImageDataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


# Class folders.


def test_class_folders(store: Store) -> None:
    dataset = open_dataset(store(CATS_AND_DOGS), 8)
    assert (len(dataset), dataset.class_names, dataset.shape) == (5, ("cat", "dog"), (3, 8, 8))
    assert dataset.labels.dtype == torch.int64
    assert dataset.labels.tolist() == [0, 0, 1, 1, 1]
    assert dataset.class_counts() == {"cat": 2, "dog": 3}
    for i, data in enumerate(CATS_AND_DOGS.values()):
        picture, label = dataset[i]
        assert torch.equal(picture, decode(data, 8))
        assert picture.dtype == torch.uint8
        assert label == dataset.labels[i]


def test_class_folders_hold_pictures_at_any_depth_and_other_files_are_passed_over(store: Store) -> None:
    other = {"cat/readme.txt": b"", "cat/.0.png": b"", ".git/a.png": b"", "__MACOSX/cat/._0.png": b"", "x.json": b"{}"}
    deep = {"cat/young/small/0.PNG": png(0), "cat/1.png": png(1), "dog/0.jpeg": png(2)}
    dataset = open_dataset(store(other | deep), 8)
    assert names(dataset) == ["cat/1.png", "cat/young/small/0.PNG", "dog/0.jpeg"]
    assert dataset.class_counts() == {"cat": 2, "dog": 1}


def test_pictures_without_folders_are_one_class(store: Store) -> None:
    dataset = open_dataset(store({"b.png": png(0), "a.png": png(1)}), 8)
    assert names(dataset) == ["a.png", "b.png"]
    assert dataset.class_counts() == {"all": 2}


def test_pictures_beside_class_folders_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"outside of the class folders .*: 'x\.png'"):
        open_dataset(store(CATS_AND_DOGS | {"x.png": png(0)}), 8)


def test_a_folder_without_pictures_is_an_empty_class(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", CATS_AND_DOGS)
    (data / "emu").mkdir()
    archive = packed(tmp_path / "data.zip", CATS_AND_DOGS | {"emu/": b""})
    for source in (data, archive):
        dataset = open_dataset(source, 8)
        assert dataset.class_counts() == {"cat": 2, "dog": 3, "emu": 0}
        with pytest.raises(ValueError, match="classes without pictures: 'emu'"):
            check_balance(dataset)


def test_one_folder_around_everything_in_a_zip_is_looked_through(tmp_path: Path) -> None:
    wrapped = {f"animals/{name}": data for name, data in CATS_AND_DOGS.items()}
    assert open_dataset(packed(tmp_path / "a.zip", wrapped), 8).class_counts() == {"cat": 2, "dog": 3}
    one_class = {"cat/0.png": png(0), "cat/1.png": png(1)}
    assert open_dataset(packed(tmp_path / "b.zip", one_class), 8).class_counts() == {"cat": 2}
    index = {f"animals/{name}": data for name, data in edm({"0/a.png": 0, "0/b.png": 1}).items()}
    assert open_dataset(packed(tmp_path / "c.zip", index), 8).class_counts() == {"0": 1, "1": 1}


# Splits.


def test_splits(store: Store) -> None:
    source = store(class_folders({"train/cat": 2, "train/dog": 1, "val/cat": 1, "val/dog": 4}))
    assert open_dataset(source, 8).class_counts() == {"cat": 2, "dog": 1}
    assert open_dataset(source, 8, split="val").class_counts() == {"cat": 1, "dog": 4}
    assert open_dataset(source, 8, split="validation").class_counts() == {"cat": 1, "dog": 4}
    with pytest.raises(ValueError, match=r"no split 'test' in .*; there are: train, val"):
        open_dataset(source, 8, split="test")


def test_a_split_of_data_without_splits_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"has no splits, so split must be 'train', which is everything; got 'test'"):
        open_dataset(store(CATS_AND_DOGS), 8, split="test")


def test_a_class_may_be_called_like_a_split(store: Store) -> None:
    assert open_dataset(store(class_folders({"train": 1, "plane": 1})), 8).class_names == ("plane", "train")


def test_an_index_beside_the_splits_covers_each(store: Store) -> None:
    lines = as_lines({"file_name": "train/a.png", "label": "x"}, {"file_name": "test/b.png", "label": "y"})
    source = store({"train/a.png": png(0), "test/b.png": png(1), "metadata.jsonl": lines})
    assert open_dataset(source, 8).class_counts() == {"x": 1}
    assert open_dataset(source, 8, split="test").class_counts() == {"y": 1}


# dataset.json


def edm(labels: dict[str, object]) -> dict[str, bytes]:
    """The StyleGAN/EDM layout."""
    pictures = {name: png(i) for i, name in enumerate(labels)}
    return pictures | {"dataset.json": as_json({"labels": [list(pair) for pair in labels.items()]})}


@pytest.mark.parametrize(
    ("labels", "ids", "class_names"),
    [
        ({"b/0.png": 0, "a/0.png": 1, "b/1.png": 0}, [1, 0, 0], ("b", "a")),  # folders are the classes
        ({"00/0.png": 1, "00/1.png": 0, "01/2.png": 1}, [1, 0, 1], ("0", "1")),  # folders are parts
        ({"a/0.png": 2, "b/1.png": 0}, [2, 0], ("0", "1", "2")),  # an id without folder
        ({"0.png": 0, "1.png": 0}, [0, 0], ("0",)),
        ({"a/0.png": None, "b/1.png": None}, [0, 0], ("all",)),
    ],
)
def test_labels_of_a_dataset_json(
    store: Store, labels: dict[str, object], ids: list[int], class_names: tuple[str, ...]
) -> None:
    dataset = open_dataset(store(edm(labels)), 8)
    assert dataset.labels.tolist() == ids
    assert dataset.class_names == class_names


def test_a_dataset_json_without_labels(store: Store) -> None:
    content = {"00/0.png": png(0), "01/1.png": png(1), "dataset.json": as_json({"labels": None})}
    assert open_dataset(store(content), 8).class_counts() == {"all": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more.png": png(9)}, r"'dataset.json' in .*: it does not name the pictures 'more.png'"),
        ({"dataset.json": as_json({"labels": [["a.png", 0], ["c.png", 1]]})}, "pictures that do not exist: 'c.png'"),
        ({"dataset.json": as_json({"labels": [["a.png", 0], ["b.png", None]]})}, "it has no label for 'b.png'"),
        ({"dataset.json": as_json({"labels": [["a.png", 0], ["b.png", -1]]})}, "from 0 to 999999, got -1"),
        ({"dataset.json": as_json({"labels": [["a.png", 0], ["b.png", [0, 1]]]})}, r"whole numbers or .* got \[0, 1\]"),
        ({"dataset.json": as_json({"labels": [["a.png", 0], ["b.png", 0.5]]})}, "whole numbers or all texts, got 0.5"),
        ({"dataset.json": as_json({"labels": {"a.png": 0}})}, '"labels" must be a list'),
        ({"dataset.json": as_json({})}, "it must hold"),
        ({"dataset.json": b"{"}, "'dataset.json' in "),
        ({"dataset.json": b"\xff"}, "'dataset.json' in "),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(store: Store, change: Content, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(store({**edm({"a.png": 0, "b.png": 1}), **change}), 8)


def test_a_label_column_needs_metadata(store: Store) -> None:
    with pytest.raises(ValueError, match=r"label='kind' needs a metadata.jsonl"):
        open_dataset(store(CATS_AND_DOGS), 8, label="kind")


def test_a_label_column_of_a_dataset_json_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"label='kind' chooses a column of a metadata.jsonl; this layout has none"):
        open_dataset(store(edm({"a.png": 0})), 8, label="kind")


# Metadata.

LINES = as_lines(
    {"file_name": "a.png", "kind": "fish", "number": 1, "label": "wet"},
    {"file_name": "in/b.png", "kind": "bird", "number": 0, "label": "dry"},
    {"file_name": "c.png", "kind": "fish", "number": 2, "label": "wet"},
)
FISH = {"a.png": png(0), "in/b.png": png(1), "c.png": png(2), "metadata.jsonl": LINES}


@pytest.mark.parametrize(
    ("label", "counts"),
    [
        ("kind", {"bird": 1, "fish": 2}),
        ("number", {"0": 1, "1": 1, "2": 1}),
        (None, {"dry": 1, "wet": 2}),
    ],
)
def test_labels_of_a_metadata_jsonl(store: Store, label: str | None, counts: dict[str, int]) -> None:
    dataset = open_dataset(store(FISH), 8, label=label)
    assert dataset.class_counts() == counts
    assert names(dataset) == ["a.png", "c.png", "in/b.png"]


def test_metadata_without_a_label_column_is_one_class(store: Store) -> None:
    lines = as_lines({"file_name": "x/a.png", "text": "a fish"}, {"file_name": "y/b.png", "text": "a bird"})
    dataset = open_dataset(store({"x/a.png": png(0), "y/b.png": png(1), "metadata.jsonl": lines}), 8)
    assert dataset.class_counts() == {"all": 2}


def test_labels_of_a_metadata_csv(store: Store) -> None:
    table = b"file_name,kind\na.png,fish\nb.png,bird\n"
    dataset = open_dataset(store({"a.png": png(0), "b.png": png(1), "metadata.csv": table}), 8, label="kind")
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.class_names == ("bird", "fish")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES, "no column 'colour'; there are: kind, label, number"),
        (as_lines({"file": "a.png"}), "every line must have a file_name"),
        (b"[1]\n", "every line must have a file_name"),
        (b"{\n", "'metadata.jsonl' in "),
        (
            as_lines({"file_name": "a.png", "colour": "red"}, {"file_name": "c.png"}, {"file_name": "in/b.png"}),
            "no label",
        ),
    ],
)
def test_metadata_that_do_not_fit_are_refused(store: Store, lines: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(store(FISH | {"metadata.jsonl": lines}), 8, label="colour")


# Nothing to open.


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.zip"
    text.write_text("no zip")
    for source, message in (
        (tmp_path / "nowhere", "does not exist"),
        (str(tmp_path / "nowhere.zip"), "does not exist"),
        (text, "is neither a folder nor a zip"),
        (folder(tmp_path / "empty", {}), "no pictures in .*; looked for .bmp"),
        (packed(tmp_path / "empty.zip", {}), "no pictures in"),
        (
            packed(tmp_path / "lzma.zip", CATS_AND_DOGS, zipfile.ZIP_LZMA),
            r"'cat/0.png' in .* is encrypted or not deflated",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(source, 8)
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        open_dataset(tmp_path, 0)


def test_a_zip_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    archive = packed(tmp_path / "data.zip", CATS_AND_DOGS)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"neither a folder nor a zip|damaged zip"):
        open_dataset(archive, 8)


# Decoding.


def test_a_picture_of_another_size_is_cropped_around_its_centre_and_resized() -> None:
    wide = Image.new("RGB", (40, 8), "black")
    wide.paste("red", (16, 0, 24, 8))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    assert torch.equal(decode(encoded(wide), 8), red.expand(3, 8, 8))
    assert torch.equal(decode(encoded(wide.transpose(Image.Transpose.ROTATE_90)), 4), red.expand(3, 4, 4))
    assert torch.equal(decode(encoded(wide), 20), red.expand(3, 20, 20))


def test_reducing_does_not_alias() -> None:
    board = Image.new("L", (64, 64))
    board.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    reduced = decode(encoded(board), 16).float()
    assert (reduced - 127.5).abs().max() < 10


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_over_white(mode: str) -> None:
    picture = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    picture.putpixel((0, 0), (40, 40, 40, 255))
    if mode == "RGBA":
        picture.putpixel((1, 1), (0, 0, 0, 51))
    kind = "TIFF" if mode == "PA" else "PNG"
    pixels = decode(encoded(picture.convert(mode) if mode != "PA" else picture, kind), 2)
    assert pixels[:, 0, 0].tolist() == [40] * 3
    assert pixels[:, 0, 1].tolist() == [255] * 3
    if mode == "RGBA":
        assert pixels[:, 1, 1].tolist() == [204] * 3  # 255·(1 - 51/255)


def test_a_transparent_colour_of_a_palette_lies_over_white() -> None:
    picture = Image.new("P", (2, 1), 1)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((0, 0), 0)
    pixels = decode(encoded(picture, transparency=0), 1)
    assert pixels.flatten().tolist() == [255] * 3
    assert decode(encoded(picture.crop((1, 0, 2, 1))), 1).flatten().tolist() == [40, 50, 60]


def test_grey_pictures_of_8_and_16_bits() -> None:
    assert decode(encoded(Image.new("L", (1, 1), 77)), 1).flatten().tolist() == [77] * 3
    assert decode(encoded(Image.new("I;16", (1, 1), 77 * 257)), 1).flatten().tolist() == [77] * 3
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), 1).flatten().tolist() == [255] * 3


def test_the_rotation_of_a_camera_is_undone() -> None:
    picture = Image.new("RGB", (2, 2), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    assert decode(encoded(picture, exif=exif), 2)[0].tolist() == [[0, 255], [0, 0]]


# Pictures that cannot be read.

BAD = {
    "cut.png": png(0)[:-40],
    "empty.png": b"",
    "text.png": b"no picture",
    "float.tiff": encoded(Image.new("F", (2, 2)), "TIFF"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unreadable_picture_is_named(store: Store, name: str) -> None:
    dataset = open_dataset(store({f"cat/{name}": BAD[name], "cat/good.png": png(1)}), 8)
    bad = 0 if name < "good.png" else 1
    dataset[1 - bad]
    with pytest.raises(ValueError, match=rf"^cannot read the picture 'cat/{name}' in '.*data.*': .+$"):
        dataset[bad]
    with pytest.raises(ValueError, match=name):
        in_memory(dataset)


def test_unreadable_pictures_are_left_out_on_request(store: Store) -> None:
    content = {f"cat/{name}": data for name, data in BAD.items()} | {"cat/good.png": png(1), "dog/0.png": png(2)}
    calls = []
    with pytest.warns(
        UserWarning, match=r"4 of 6 pictures in .* are left out: 'cat/cut.png', 'cat/empty.png', 'cat/float"
    ):
        dataset = open_dataset(
            store(content), 8, skip_bad=True, progress=lambda done, total: calls.append((done, total))
        )
    assert names(dataset) == ["cat/good.png", "dog/0.png"]
    assert dataset.skipped == tuple(f"cat/{name}" for name in sorted(BAD))
    assert dataset.class_counts() == {"cat": 1, "dog": 1}
    assert torch.equal(dataset[1][0], decode(png(2), 8))
    assert calls == [(6, 6)]


def test_only_unreadable_pictures_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"4 of 4 pictures .* cannot be read: 'cut.png'.*; the first: cannot read"):
        open_dataset(store(BAD), 8, skip_bad=True)


def test_nothing_is_left_out_of_sound_data(store: Store, recwarn: pytest.WarningsRecorder) -> None:
    assert len(open_dataset(store(CATS_AND_DOGS), 8, skip_bad=True)) == 5
    assert not recwarn.list


def test_damage_inside_a_zip_is_noticed(tmp_path: Path) -> None:
    archive = packed(tmp_path / "data.zip", CATS_AND_DOGS, zipfile.ZIP_STORED)
    data = bytearray(archive.read_bytes())
    data[len("cat/0.png") + 30 + 60] ^= 1  # in the first picture's pixels
    archive.write_bytes(data)
    dataset = open_dataset(archive, 8)
    with pytest.raises(ValueError, match=r"'cat/0.png' in .*: the zip is damaged, or was changed since it was opened"):
        dataset[0]
    dataset[1]


def test_a_link_to_nowhere_is_an_unreadable_picture(tmp_path: Path) -> None:
    (folder(tmp_path / "data", CATS_AND_DOGS) / "cat/link.png").symlink_to("nowhere.png")
    dataset = open_dataset(tmp_path / "data", 8)
    assert len(dataset.fingerprint) == 64
    with pytest.raises(ValueError, match=r"cannot read the picture 'cat/link.png' in .*No such file"):
        dataset[2]


def test_a_picture_that_vanished_is_named(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path / "data", CATS_AND_DOGS), 8)
    (tmp_path / "data/dog/0.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read the picture 'dog/0.png' in .*No such file"):
        dataset[2]


# Fingerprints, memory, other processes.


def test_the_fingerprint_follows_names_content_and_labels(tmp_path: Path) -> None:
    content = edm({"a/0.png": 0, "b/0.png": 1})
    changes = [
        {},
        {"dataset.json": as_json({"labels": [["a/0.png", 1], ["b/0.png", 0]]})},
        {"b/0.png": png(5)},
        {"b/1.png": png(5), "dataset.json": as_json({"labels": [["a/0.png", 0], ["b/0.png", 1], ["b/1.png", 1]]})},
    ]
    found = [open_dataset(packed(tmp_path / f"{i}.zip", content | c), 8).fingerprint for i, c in enumerate(changes)]
    assert len(set(found)) == len(changes)
    again = packed(tmp_path / "again.zip", dict(reversed(content.items())), zipfile.ZIP_STORED)
    assert open_dataset(again, 16).fingerprint == found[0]
    copies = [folder(tmp_path / name, content) for name in ("one", "two")]
    assert len({open_dataset(copy, 8).fingerprint for copy in copies}) == 1


def test_an_uncompressed_picture_that_was_changed_is_another_one(tmp_path: Path) -> None:
    found = []
    for number in (0, 0, 1):
        place = tmp_path / str(len(found)) / "a"
        place.mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "0.bmp")
        found.append(open_dataset(place.parent, 8).fingerprint)
    assert found[0] == found[1] != found[2]


def test_in_memory_is_the_same_data(store: Store) -> None:
    dataset = open_dataset(store(class_folders({"cat": 70, "dog": 1})), 8)
    calls = []
    memory = in_memory(dataset, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(64, 71), (71, 71)]
    assert torch.equal(memory.images, torch.stack([dataset[i][0] for i in range(71)]))
    for name in ("class_names", "fingerprint", "shape"):
        assert getattr(memory, name) == getattr(dataset, name)
    assert torch.equal(memory.labels, dataset.labels)
    assert memory.class_counts() == dataset.class_counts()
    assert memory[70][1] == 1
    assert in_memory(memory) is memory


def test_more_than_the_memory_is_refused(store: Store) -> None:
    with pytest.raises(
        ValueError, match=r"5 pictures of 99999999x99999999 need \d+ GiB and this machine has \d+; read"
    ):
        in_memory(open_dataset(store(CATS_AND_DOGS), 99_999_999))


def test_a_data_set_can_be_pickled(store: Store) -> None:
    dataset = open_dataset(store(CATS_AND_DOGS), 8)
    first = dataset[0][0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0][0], first)
    assert copy.fingerprint == dataset.fingerprint


# Hugging Face data sets by name.


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_name_without_the_library_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"'owner/name' is not a folder or zip here; .* pip install datasets"):
        open_dataset("owner/name", 8)


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    folder(tmp_path / "owner/name", CATS_AND_DOGS)
    assert len(open_dataset("owner/name", 8)) == 5


@pytest.mark.parametrize(("label", "counts"), [(None, {"x": 2, "y": 1, "z": 0}), ("kind", {"a": 1, "b": 2})])
def test_a_table_of_the_datasets_library(label: str | None, counts: dict[str, int]) -> None:
    library = pytest.importorskip("datasets")
    from diffattn.data.hub import from_table

    features = {
        "image": library.Image(),
        "id": library.ClassLabel(names=["x", "y", "z"]),
        "kind": library.Value("string"),
    }
    rows = {"image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)], "id": [0, 1, 0], "kind": ["b", "a", "b"]}
    table = library.Dataset.from_dict(rows, features=library.Features(features))
    files, listing = from_table("owner/name", table, label)
    dataset = ImageDataset(files, listing.rows, listing.ids, listing.class_names, 8)
    assert dataset.class_counts() == counts
    assert dataset[2][0][:, 0, 0].tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="'owner/name' has no column 'colour'; there are: image, id, kind"):
        from_table("owner/name", table, "colour")
    with pytest.raises(ValueError, match="'owner/name' has no column of pictures"):
        from_table("owner/name", table.select_columns(["id"]), None)


# Classes.


def test_balance(store: Store) -> None:
    uneven = check_balance(open_dataset(store(CATS_AND_DOGS), 8))
    assert (uneven.smallest, uneven.largest, uneven.exact) == (2, 3, False)
    assert uneven.lines() == ["5 pictures in 2 classes, from 2 ('cat') to 3 ('dog')"]
    assert uneven.to_dict()["counts"] == {"cat": 2, "dog": 3}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (class_folders({"a": 2, "b": 2}), "4 pictures in 2 classes, 2 in each"),
        ({"a.png": png(0)}, "1 picture in 1 class"),
    ],
)
def test_exact_balance(store: Store, content: Content, text: str) -> None:
    balance = check_balance(open_dataset(store(content), 8))
    assert balance.exact
    assert str(balance) == text


def test_classes_must_be_those_of_the_model() -> None:
    check_classes(("a", "b"), ["a", "b"])
    with pytest.raises(ValueError, match=r"do not match .*; missing in the data: 'b'; unknown to the model: 'c', 'd'$"):
        check_classes(("a", "c", "d"), ("a", "b"))
    with pytest.raises(ValueError, match=r"'5', '6', '7', '8', '9' and 15 more$"):
        check_classes([str(i) for i in range(5)], sorted(map(str, range(25)), key=int))
    with pytest.raises(ValueError, match=r"the ids differ, for example of 'b', 'a'$"):
        check_classes(("b", "a", "c"), ("a", "b", "c"))


# The real thing, where it is: DIFFATTN_DATA=folder pytest …


def test_cifar10() -> None:
    path = Path(os.environ.get("DIFFATTN_DATA", "data"), "cifar10-test.zip")
    if not path.exists():
        pytest.skip(f"no {path}")
    dataset = open_dataset(path, 32)
    assert check_balance(dataset).lines() == ["10000 pictures in 10 classes, 1000 in each"]
    assert (dataset.class_names[0], dataset.class_names[9]) == ("airplane", "truck")
    assert dataset[9999][0].shape == (3, 32, 32)

"""Which folders are the classes: wrappers, splits, their siblings, and ambiguities."""

import zipfile
from pathlib import Path

import pytest
from support.tiny_pictures import as_json, class_folders, folder, packed, png

from diffattn.data import check_balance, open_dataset

README = {"README.md": b"# Cats and dogs", "LICENSE": b"MIT"}
CHOSEN = {
    "images and a README": (class_folders({"images/cat": 2, "images/dog": 1}) | README, "images/",
                            {"cat": 2, "dog": 1}),
    "nested one deeper": (class_folders({"pets/images/cat": 2, "pets/images/dog": 1}) | README, "pets/images/",
                          {"cat": 2, "dog": 1}),
    "a wrapper of any name": (class_folders({"pets-v2/cat": 2, "pets-v2/dog": 1}), "pets-v2/", {"cat": 2, "dog": 1}),
    "annotations beside": (class_folders({"images/cat": 1, "images/dog": 1}) | {"annotations/a.xml": b"<a/>"},
                           "images/", {"cat": 1, "dog": 1}),
    "train and val": (class_folders({"train/cat": 2, "train/dog": 1, "val/cat": 1, "val/dog": 1}), "train/",
                      {"cat": 2, "dog": 1}),
    "a third folder": (class_folders({"train/cat": 2, "train/dog": 1, "val/cat": 1, "val/dog": 1, "extra": 3}),
                       "train/", {"cat": 2, "dog": 1}),
    "a third folder of classes": (class_folders({"train/cat": 2, "val/cat": 1, "unsorted/cat": 3}), "train/",
                                  {"cat": 2}),
    "one split and its like": (class_folders({"train/cat": 2, "train/dog": 1, "holdout/cat": 3}), "train/",
                               {"cat": 2, "dog": 1}),
    "splits in a wrapper": (class_folders({"pets/train/cat": 1, "pets/train/dog": 1, "pets/val/cat": 1}), "pets/train/",
                            {"cat": 1, "dog": 1}),
    "a wrapper in a split": (class_folders({"train/images/cat": 1, "train/images/dog": 1, "val/images/cat": 1}),
                             "train/images/", {"cat": 1, "dog": 1}),
    "splits in the classes": (class_folders({"cat/train": 3, "cat/test": 1, "dog/train": 2, "dog/test": 1}), "",
                              {"cat": 3, "dog": 2}),
    "folders in the classes": (class_folders({"cat/young": 2, "cat/old": 1, "dog/young": 1}), "", {"cat": 3, "dog": 1}),
    "splits of other names": (class_folders({"training_set/cat": 2, "training_set/dog": 1, "test_set/cat": 1}),
                              "training_set/", {"cat": 2, "dog": 1}),
    "splits of other names, each in itself": (
        class_folders({"seg_train/seg_train/cat": 2, "seg_train/seg_train/dog": 1, "seg_test/seg_test/cat": 1})
        | class_folders({"seg_pred/seg_pred": 2}), "seg_train/seg_train/", {"cat": 2, "dog": 1}),
    "classes with a split's word": (class_folders({"freight_train": 2, "test_tube": 1}), "",
                                    {"freight_train": 2, "test_tube": 1}),
    "images alone": (class_folders({"images": 2}) | README, "images/", {"all": 2}),
    "a class like a split": (class_folders({"train": 2, "plane": 1}), "", {"plane": 1, "train": 2}),
}  # fmt: skip


@pytest.mark.parametrize("store", [folder, packed], ids=["folder", "zip"])
@pytest.mark.parametrize("case", CHOSEN)
def test_classes_are_found_by_content_and_named(tmp_path: Path, case: str, store: object) -> None:
    content, base, counts = CHOSEN[case]
    dataset = open_dataset(store(tmp_path / "data", content), 8)  # type: ignore[operator]
    assert dataset.class_counts() == counts
    origin = f" from {base}" if base else ""
    plural = "es" if len(counts) > 1 else ""
    assert dataset.lines()[0] == f"{len(counts)} class{plural}{origin}: {', '.join(counts)}"


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    content, _, _ = CHOSEN["a third folder"]
    dataset = open_dataset(folder(tmp_path / "data", content | {"train/cat/notes.txt": b""}), 8)
    assert dataset.lines()[1:] == [
        "not used: extra/, 3 pictures",
        "not used: 1 file of other kinds: 'train/cat/notes.txt'",
    ]
    assert dataset.without([0]).lines()[1].startswith("left out: 1 unreadable picture: 'train/cat/0.png'")


def test_the_other_splits(tmp_path: Path) -> None:
    content, _, _ = CHOSEN["a third folder of classes"]
    data = folder(tmp_path / "data", content)
    assert open_dataset(data, 8, split="validation").class_counts() == {"cat": 1}
    assert open_dataset(data, 8, split="unsorted").class_counts() == {"cat": 3}
    inside = folder(tmp_path / "inside", CHOSEN["splits in the classes"][0])
    assert open_dataset(inside, 8, split="test").class_counts() == {"cat": 1, "dog": 1}
    with pytest.raises(ValueError, match=r"no split 'val' in the class folders of .*; there are: test, train"):
        open_dataset(inside, 8, split="val")


@pytest.mark.parametrize("store", [folder, packed], ids=["folder", "zip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (class_folders({"train": 1, "val": 1, "extra": 1}), "two ways: 'train', 'val' as splits, or as classes beside"),
        (class_folders({"train/steam": 1, "plane": 1}), "two ways: 'train' as splits, or as classes beside 'plane'"),
        (class_folders({"images/cat": 1, "images/dog": 1, "masks/cat": 1}), "may be 'images', 'masks', or in 'images'"),
        (class_folders({"images/cat": 1, "images/dog": 1, "docs": 1}), "may be 'docs', 'images', or in 'images'"),
        (
            class_folders({"photo/cat": 1, "photo/dog": 1, "art/cat": 1, "art/dog": 1}),
            "the classes may be 'art', 'photo', or in each of them 'cat', 'dog'; .* as the split",
        ),
        (class_folders({"images/cat": 1, "images": 1}), "'images' in .* two ways: it contains pictures, and folders"),
        (class_folders({"images/cat": 1, "images/dog": 1}) | {"cover.png": png(9)}, "outside of the class folders"),
        (
            class_folders({"a": 1, "b": 1}) | {"a/dataset.json": as_json({"labels": [["0.png", 1]]})},
            "two ways: its folders may be classes, or contain labels of their own in 'a/dataset.json'",
        ),
    ],
)
def test_two_readings_are_refused(tmp_path: Path, content: dict[str, bytes], message: str, store: object) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(store(tmp_path / "data", content), 8)  # type: ignore[operator]


def test_an_empty_class_beside_one_with_folders_is_no_wrapper(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", class_folders({"cat/young": 1, "cat/old": 1}))
    (data / "dog").mkdir()
    with pytest.raises(ValueError, match="classes without pictures: 'dog'"):
        check_balance(open_dataset(data, 8))


def test_an_index_counts_before_the_names_of_folders(tmp_path: Path) -> None:
    labels = as_json({"labels": [["images/x/0.png", 0], ["train/y/0.png", 1]]})
    data = folder(tmp_path / "data", class_folders({"images/x": 1, "train/y": 1}) | {"dataset.json": labels})
    assert open_dataset(data, 8).labels.tolist() == [0, 1]


# Links.


def pets(path: Path) -> Path:
    return folder(path, class_folders({"cat": 4, "dog": 4}))


@pytest.mark.parametrize("target", ["..", ".", "../..", "../dog", "../../data", "../../data/dog"])
def test_a_link_that_leads_back_adds_nothing(tmp_path: Path, target: str) -> None:
    data = pets(tmp_path / "data")
    folder(tmp_path / "other", class_folders({"emu": 3}))
    (data / "cat/up").symlink_to(target)
    dataset = open_dataset(data, 8)
    assert dataset.class_counts() == {"cat": 4, "dog": 4}
    assert dataset.lines()[1] == "not followed: 1 link, since each file counts once: 'cat/up'"


def test_links_to_pictures_and_folders_elsewhere_are_followed_once(tmp_path: Path) -> None:
    data, other = pets(tmp_path / "data"), folder(tmp_path / "other", class_folders({"emu": 3, "fox": 1}))
    (data / "emu").symlink_to(other / "emu")
    (data / "emu2").symlink_to(other / "emu")
    (data / "cat/linked.png").symlink_to(other / "fox/0.png")
    (data / "dog/again.png").symlink_to("../cat/0.png")
    (other / "emu/back").symlink_to(data)
    (other / "emu/around").symlink_to("..")
    dataset = open_dataset(data, 8)
    assert dataset.class_counts() == {"cat": 5, "dog": 4, "emu": 3}
    assert len(dataset[8][0]) == 3
    assert len(dataset.files.repeated) == 4
    (tmp_path / "link").symlink_to(data)
    assert open_dataset(tmp_path / "link", 8).class_counts() == dataset.class_counts()


def test_a_link_to_hidden_files_is_followed(tmp_path: Path) -> None:
    """As tools that keep large files aside arrange them."""
    data = pets(tmp_path / "data")
    folder(data / ".store", {"x": png(7)})
    (data / "cat/x.png").symlink_to("../.store/x")
    assert open_dataset(data, 8).class_counts() == {"cat": 5, "dog": 4}


def test_a_zip_follows_no_links(tmp_path: Path) -> None:
    archive = packed(tmp_path / "data.zip", class_folders({"cat": 1, "dog": 1}))
    with zipfile.ZipFile(archive, "a") as file:
        link = zipfile.ZipInfo("cat/passwd.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    dataset = open_dataset(archive, 8)
    assert dataset.class_counts() == {"cat": 1, "dog": 1}
    assert dataset.files.repeated == ("cat/passwd.png",)


def test_paths_that_leave_a_zip_are_left_out(tmp_path: Path) -> None:
    content = class_folders({"cat": 1}) | {"../x/0.png": png(8), "cat/../../0.png": png(9), "/dog/0.png": png(10)}
    before = set(tmp_path.iterdir())
    assert open_dataset(packed(tmp_path / "data.zip", content), 8).class_counts() == {"cat": 1, "dog": 1}
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "data.zip"}

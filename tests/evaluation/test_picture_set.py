"""Picture sets from folders, zips and `.npz`: order, size, hash, and what is refused."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_pictures import encoded, folder, packed, png

from diffattn.evaluation.picture_set import fit, open_pictures
from diffattn.metrics.adm import write_pictures
from diffattn.metrics.features import as_uint8

FOUR = {"b/1.png": png(1), "b/0.png": png(0), "a.png": png(2), "c.PNG": png(3), "notes.txt": b"x", ".d.png": b"x"}


def pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)


def test_folder_and_zip_hold_the_same_in_the_order_of_names(tmp_path: Path) -> None:
    one, other = open_pictures(folder(tmp_path / "f", FOUR)), open_pictures(packed(tmp_path / "z.zip", FOUR))
    assert one.names == other.names == ("a.png", "b/0.png", "b/1.png", "c.PNG")
    assert one.hash == other.hash
    assert one.size == (8, 8)
    assert len(one) == 4
    expected = torch.stack([pixels(png(i)) for i in (2, 0, 1, 3)])
    torch.testing.assert_close(one.batch(0, 4), expected)
    torch.testing.assert_close(other.batch(1, 3), expected[1:3])
    write_pictures(tmp_path / "a.npz", expected)
    stored = open_pictures(tmp_path / "a.npz")
    assert stored.hash == one.hash
    torch.testing.assert_close(stored.batch(2, 4), expected[2:])


def test_the_first_so_many_that_can_be_read(tmp_path: Path) -> None:
    place = folder(tmp_path / "f", FOUR | {"b/0.png": b"broken"})
    with pytest.warns(UserWarning, match=r"1 of 4 pictures in 'f' cannot be read and are left out: 'b/0.png'"):
        found = open_pictures(place, limit=3, skip_bad=True)
    assert (found.names, found.rows, found.skipped) == (("a.png", "b/1.png", "c.PNG"), (0, 2, 3), ("b/0.png",))
    torch.testing.assert_close(found.batch(1, 2)[0], pixels(png(1)))
    with pytest.raises(ValueError, match=r"1 of 4 pictures in 'f' cannot be read: 'b/0.png' \(the first: .*skip-bad"):
        open_pictures(place)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="at least 4 pictures are needed, 'f' has 3"),
    ):
        open_pictures(place, limit=4, skip_bad=True)


def test_several_sizes_are_refused_or_brought_to_one(tmp_path: Path) -> None:
    place = folder(tmp_path / "f", {"a.png": png(0), "b.png": png(1, (12, 10))})
    with pytest.raises(ValueError, match=r"several sizes: 8x8 \('a.png'\), 12x10 \('b.png'\); bring them to one"):
        open_pictures(place)
    found = open_pictures(place, side=6)
    assert found.size == (6, 6)
    torch.testing.assert_close(found.batch(1, 2)[0], fit(pixels(png(1, (12, 10))), 6))


def test_fit_crops_the_centre() -> None:
    x = torch.zeros(3, 4, 8, dtype=torch.uint8)
    x[:, :, 2:6] = 200
    assert fit(x, 4).unique().tolist() == [200]
    assert fit(x[:, :, :4], 4) is not None
    assert fit(x, 2).shape == (3, 2, 2)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "no", "does not exist"),
        (lambda p: folder(p / "f", {"a.txt": b"x"}), "no pictures in"),
        (lambda p: folder(p / "f", {"a.png": png(0)}), "at least 2 pictures are needed, 'f' has 1"),
        (lambda p: packed(p / "z.zip", {"a.png": png(0), "b.png": png(1)[:60]}), "1 of 2 pictures in 'z.zip'"),
        (lambda p: npz(p / "a.npz", arr_0=np.full((3, 8, 8, 3), np.nan)), "must be uint8"),
        (lambda p: npz(p / "a.npz", mu=np.zeros(3)), "it has no arr_0, but mu"),
        (lambda p: npz(p / "a.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8)), "at least 2 pictures are needed"),
    ],
)
def test_what_is_no_set_of_pictures(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_pictures(make(tmp_path))


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey, clear = Image.new("L", (8, 8), 100), Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    found = open_pictures(folder(tmp_path / "f", {"a.png": encoded(grey), "b.png": encoded(clear)})).batch(0, 2)
    assert found[0].unique().tolist() == [100]
    assert found[1].unique().tolist() == [255]
    assert as_uint8(found).dtype == torch.uint8


def test_the_order_is_natural_and_the_first_are_of_every_folder(tmp_path: Path) -> None:
    place = folder(tmp_path / "f", {f"{i}.png": png(i) for i in range(12)})
    found = open_pictures(place)
    assert found.names == tuple(f"{i}.png" for i in range(12))
    padded = folder(tmp_path / "g", {f"{i:05d}.png": png(i) for i in range(12)})
    assert (
        open_pictures(padded).hash
        == open_pictures(packed(tmp_path / "z.zip", {f"{i}.png": png(i) for i in range(12)})).hash
    )
    assert open_pictures(place, limit=3).names == ("0.png", "1.png", "2.png")
    classes = folder(tmp_path / "c", {f"{c}/{i}.png": png(i) for c in "abc" for i in range(12)})
    assert open_pictures(classes, limit=6).names == tuple(f"{c}/{i}.png" for c in "abc" for i in range(2))
    spread = open_pictures(classes, limit=6, spread=True).names
    assert [name[0] for name in spread] == list("aabbcc")
    assert spread == open_pictures(classes, limit=6, spread=True).names
    assert spread != open_pictures(classes, limit=6).names


def test_another_picture_takes_the_place_of_an_unreadable_one(tmp_path: Path) -> None:
    content = {f"{c}/{i}.png": png(i) for c in "ab" for i in range(4)}
    place = folder(tmp_path / "f", content | {"a/0.png": b"broken"})
    for spread in (False, True):
        with pytest.warns(UserWarning, match="1 of 8 pictures"):
            found = open_pictures(place, limit=7, spread=spread, skip_bad=True)
        assert found.names == tuple(content)[1:]
    with pytest.warns(UserWarning, match="1 of 8 pictures"):
        assert open_pictures(place, limit=4, skip_bad=True).names == ("a/1.png", "a/2.png", "b/0.png", "b/1.png")


def test_a_folder_that_links_to_itself_has_each_picture_once(tmp_path: Path) -> None:
    place = folder(tmp_path / "f", FOUR)
    (place / "b/up").symlink_to("..")
    with pytest.warns(UserWarning, match="1 link in .* left out, since each picture counts once: 'b/up'"):
        assert len(open_pictures(place)) == 4


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (tmp_path / "ran").touch, ()

    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "inside.npz", arr_0=np.array([Bomb()], dtype=object))
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, message in (
        ("raw", "never loaded"),
        ("inside", "never loaded"),
        ("empty", "is not a readable .npz file"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.npz' .*{message}") as found:
            open_pictures(tmp_path / f"{name}.npz")
        assert "allow_pickle" not in str(found.value)
    assert not (tmp_path / "ran").exists()

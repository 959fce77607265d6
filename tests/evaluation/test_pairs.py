"""Pictures from files that are compared: by name, number or order; references that know their size."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from support import web
from support.tiny_metrics import tiny_extractor
from support.tiny_pictures import folder, packed, png

from diffattn.evaluation import DrawConfig, EvaluateConfig, evaluate
from diffattn.evaluation.picture_set import open_pictures
from diffattn.evaluation.quality import QualityResult
from diffattn.evaluation.references import make_reference, open_reference
from diffattn.metrics.adm import write_pictures
from diffattn.metrics.extractors import OfflineExtractor
from diffattn.metrics.reference import Reference
from diffattn.sampling import SiTPipeline

COUNT = 12


@pytest.fixture(scope="module")
def extractor() -> OfflineExtractor:
    return tiny_extractor()


def save(path: Path, names: Sequence[str], size: int = 16) -> Path:
    """Picture i is the same whatever its name."""
    return folder(path, {name: png(i, size) for i, name in enumerate(names)})


def pair(tmp_path: Path, subject: object, other: Path, **given: object) -> QualityResult:
    return evaluate(subject, folder=tmp_path / "run", paired=other, **given)  # type: ignore[arg-type]


PLAIN = [f"{i}.png" for i in range(COUNT)]


@pytest.mark.parametrize(
    ("names", "how"),
    [
        ([f"{i:05d}.png" for i in range(COUNT)], "number"),
        ([f"out_{i:05d}_.png" for i in range(COUNT)], "number"),
        ([f"{'xy'[i % 2]}/{i}.png" for i in range(COUNT)], "name"),
        ([f"{i}" + "abcdefghijkl"[i] * 3 + ".png" for i in range(COUNT)], "number"),
        (["abcdefghijkl"[i] + ".png" for i in range(COUNT)], "order"),
    ],
)
def test_the_same_pictures_under_other_names_are_identical(tmp_path: Path, names: list[str], how: str) -> None:
    found = pair(tmp_path, save(tmp_path / "a", PLAIN), save(tmp_path / "b", names))
    assert found.details["pairs"]["identical_pairs"] == COUNT
    assert found.details["matched"] == f"{COUNT} pairs by {how}"


def test_an_array_pairs_with_files(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a.npz", open_pictures(save(tmp_path / "a", PLAIN)).batch(0, COUNT))
    one_based = save(tmp_path / "b", [f"{i + 1}.png" for i in range(COUNT)])
    assert pair(tmp_path, tmp_path / "a.npz", one_based).details["pairs"]["identical_pairs"] == COUNT


def test_a_part_of_the_pictures_pairs_with_their_partners(tmp_path: Path) -> None:
    classes = save(tmp_path / "a", [f"{'xy'[i // 6]}/{i}.png" for i in range(COUNT)])
    flat = save(tmp_path / "b", [f"{i:03d}.png" for i in range(COUNT)])
    found = pair(tmp_path, classes, flat, config=EvaluateConfig(limit=4))
    assert (found.protocol.num_pictures, found.details["pairs"]["identical_pairs"]) == (4, 4)
    (flat / "007.png").write_bytes(png(7, 8))  # not among the first of this folder, but a partner
    with pytest.raises(ValueError, match=r"several sizes: 16x16 \('000.png'\), 8x8 \('007.png'\)"):
        evaluate(classes, folder=tmp_path / "sizes", paired=flat, config=EvaluateConfig(limit=4))


@pytest.mark.slow
def test_what_a_pipeline_draws_pairs_with_files(tmp_path: Path) -> None:
    web.save_sits(tmp_path, "sit")
    pipe = SiTPipeline.from_pretrained(tmp_path / "sit")
    pipe.set_progress_bar_config(disable=True)
    draw = DrawConfig(num_pictures=COUNT, steps=1, guidance=1.0)
    drawn = evaluate(pipe, folder=tmp_path / "first", paired=save(tmp_path / "a", PLAIN), draw=draw)
    assert drawn.details["matched"] == f"{COUNT} pairs by number"
    for i, path in enumerate(sorted((tmp_path / "first/pictures").iterdir())):
        path.rename(path.with_name(f"picture {i + 1}.png"))
    again = evaluate(pipe, folder=tmp_path / "second", paired=tmp_path / "first/pictures", draw=draw)
    assert again.details["pairs"]["identical_pairs"] == COUNT
    assert again.details["matched"] == f"{COUNT} pairs by order"


def test_what_has_no_partner_is_named(tmp_path: Path) -> None:
    one = save(tmp_path / "a", PLAIN)
    with pytest.raises(ValueError, match=r"'0.png' without a partner; '12.png' without a partner"):
        pair(tmp_path, one, save(tmp_path / "b", [f"{i + 1}.png" for i in range(COUNT)]))
    with pytest.raises(ValueError, match=r"on both sides, got 12 and 11; they do not pair: '11.png' without a partner"):
        pair(tmp_path, one, save(tmp_path / "c", [f"{i:03d}.png" for i in range(COUNT - 1)]))
    broken = save(tmp_path / "d", PLAIN)
    (broken / "3.png").write_bytes(b"broken")
    config = EvaluateConfig(skip_bad=True)
    for a, b in ((one, broken), (broken, one)):
        with pytest.warns(UserWarning, match="'3.png'"), pytest.raises(ValueError, match=r"'3.png': they do not pair"):
            pair(tmp_path, a, b, config=config)


def test_another_pairing_is_another_run(tmp_path: Path) -> None:
    """Renaming the files may change who is compared with whom, so stored values must not be taken up."""
    one, other = save(tmp_path / "a", PLAIN), save(tmp_path / "b", PLAIN)
    pair(tmp_path, one, other)
    swapped = {"0.png": "1.jpg", "1.png": "0.jpg"}
    for path in [other / name for name in swapped]:
        path.rename(path.with_suffix(".old"))
    for old, new in swapped.items():
        (other / old).with_suffix(".old").rename(other / new)
    with pytest.raises(ValueError, match="another protocol"):
        pair(tmp_path, one, other)


def test_prompts_of_pictures_with_a_gap_are_refused(tmp_path: Path) -> None:
    place = save(tmp_path / "a", [name for name in PLAIN if name != "5.png"])
    config = EvaluateConfig(clip="no/model", prompts=[f"a {i}" for i in range(COUNT)])
    with pytest.raises(ValueError, match="numbered from 0 to 11 without '5', so which of the 12 prompts"):
        evaluate(place, folder=tmp_path / "run", config=config)


# References.


def test_a_saved_reference_keeps_the_size_of_its_pictures(tmp_path: Path, extractor: OfflineExtractor) -> None:
    made, _ = make_reference(open_pictures(save(tmp_path / "a", PLAIN)), extractor)
    made.save(tmp_path / "made.safetensors")
    again = Reference.load(tmp_path / "made.safetensors")
    assert made.size == again.size == (16, 16)
    batch = open_pictures(tmp_path / "a").batch(0, COUNT)
    assert Reference.of("x", [batch[:5], batch[5:]], extractor).size == (16, 16)
    small, config = save(tmp_path / "small", PLAIN, 8), EvaluateConfig(extractor)
    with pytest.raises(ValueError, match=r"'small' have 8x8 pixels, the reference 16x16; bring both to one size"):
        evaluate(small, tmp_path / "made.safetensors", folder=tmp_path / "run", config=config)
    fitted = EvaluateConfig(extractor, side=16)
    assert "fid" in evaluate(small, again, folder=tmp_path / "fitted", config=fitted).scores
    web.save_sits(tmp_path, "sit")
    pipe = SiTPipeline.from_pretrained(tmp_path / "sit")
    with pytest.raises(ValueError, match=r"the drawn pictures have 8x8 pixels, the reference 16x16"):
        evaluate(pipe, again, folder=tmp_path / "drawn", config=EvaluateConfig(extractor, side=8))


def test_a_reference_without_a_size_still_loads(tmp_path: Path, extractor: OfflineExtractor) -> None:
    made, _ = make_reference(open_pictures(save(tmp_path / "a", PLAIN)), extractor)
    made.save(tmp_path / "made.safetensors")
    with safe_open(tmp_path / "made.safetensors", "pt") as file:
        labels = {key: value for key, value in file.metadata().items() if key != "size"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
    save_file(tensors, tmp_path / "old.safetensors", labels)
    old = Reference.load(tmp_path / "old.safetensors")
    assert old.size is None
    assert open_reference(old, extractor).size is None
    small = save(tmp_path / "small", PLAIN, 8)
    assert "fid" in evaluate(small, old, folder=tmp_path / "run", config=EvaluateConfig(extractor)).scores
    save_file(tensors, tmp_path / "odd.safetensors", labels | {"size": "large"})
    with pytest.raises(ValueError, match=r"odd.safetensors' is not a reference saved by diffattn"):
        Reference.load(tmp_path / "odd.safetensors")


def test_a_reference_of_some_pictures_is_of_all_classes(tmp_path: Path) -> None:
    content = {f"{animal}/{i}.png": png(i) for animal in ("ant", "bee", "cat") for i in range(50)}
    names = open_pictures(packed(tmp_path / "data.zip", content), limit=30, spread=True).names
    assert [sum(name.startswith(animal) for name in names) for animal in ("ant", "bee", "cat")] == [10, 10, 10]
    numbers = sorted(int(name.split("/")[1].removesuffix(".png")) for name in names)
    assert numbers[0] < 10 < 40 < numbers[-1]

"""`pipelines/train_classifiers.py` end to end on generated pictures."""

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

PROGRAM = Path(__file__).parents[2] / "pipelines" / "train_classifiers.py"
sys.path.insert(0, str(PROGRAM.parent))

import train_classifiers  # noqa: E402
from classifiers.augment import drawing_batches, photo_batches  # noqa: E402
from classifiers.data import Labelled, load, split_classes  # noqa: E402
from classifiers.export import accuracy  # noqa: E402
from classifiers.loop import Recipe, train  # noqa: E402
from classifiers.whitening import whitening_filters  # noqa: E402
from training_loop import Budget, Progress, step_rng  # noqa: E402
from typer.testing import Result  # noqa: E402

from diffattn.metrics.classifier import Classifier  # noqa: E402
from diffattn.metrics.extractors import load_extractor  # noqa: E402

COLOURS = ((250, 20, 20), (20, 200, 20), (30, 30, 250))


def picture(colour: tuple[int, int, int], size: int, seed: int, kind: str) -> bytes:
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def photos(path: Path, count: int) -> Path:
    """One colour per class, in the layout of StyleGAN and EDM."""
    with zipfile.ZipFile(path, "w") as archive:
        labels = []
        for i in range(count):
            labels.append([f"colour{i % 3}/{i:04}.png", i % 3])
            archive.writestr(labels[-1][0], picture(COLOURS[i % 3], 32, i, "PNG"))
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def drawings(path: Path, count: int) -> Path:
    """The same as captioned pictures."""
    with zipfile.ZipFile(path, "w") as archive:
        rows = []
        for i in range(count):
            rows.append(json.dumps({"file_name": f"{i}.webp", "text": "it", "subgroup": f"colour{i % 3}"}))
            archive.writestr(f"{i}.webp", picture(COLOURS[i % 3], 64, i, "WEBP"))
        archive.writestr("metadata.jsonl", "\n".join(rows))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(train_classifiers.app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("classifiers")
    photos(made / "train.zip", 24)
    photos(made / "test.zip", 6)
    drawings(made / "drawings.zip", 36)
    return made


def train_cifar(folder: Path, name: str, *more: object) -> Path:
    sets = ("--train", folder / "train.zip", "--test", folder / "test.zip")
    places = ("--work", folder / f"{name}-work", "--out", folder / name)
    result = run("cifar", *sets, *places, "--steps", 6, "--batch", 8, *more)
    assert result.exit_code == 0, result.output
    return folder / name


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return train_cifar(folder, "cifar")


@pytest.mark.slow
def test_the_export_is_an_extractor_with_figures_and_a_card(trained: Path) -> None:
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["steps"] == 6
    assert (figures["test_pictures"], figures["classes"]) == (6, 3)
    assert 0 <= figures["test_accuracy_percent"] <= 100
    assert figures["weight_bytes"] < 3e6
    card = (trained / "README.md").read_text()
    assert f"{figures['test_accuracy_percent']} %" in card
    assert "--train train.zip --test test.zip --steps 6" in card
    assert "{" not in card.split("```")[0]
    assert load_file(trained / "diffusion_pytorch_model.safetensors")["head.weight"].dtype == torch.float16
    extractor: Any = load_extractor("cifar-classifier", trained)
    assert extractor.domain == "CIFAR-10"
    assert list(extractor.model.config["class_names"]) == ["colour0", "colour1", "colour2"]
    assert extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, figures["num_features"])


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_nothing_happened(folder: Path, trained: Path) -> None:
    data = load(folder / "train.zip", 32, "label", folder / "cifar-work")
    batches = photo_batches(data, 8, 0)

    def interrupted(step: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 3:
            raise KeyboardInterrupt
        return batches(step, rng)

    recipe = Recipe(Budget(steps=6), batch=8, save_every=0)
    job = train_classifiers.Job(recipe, folder / "again-work", folder / "again")
    with pytest.raises(KeyboardInterrupt):
        train(train_classifiers.build(job, train_classifiers.CIFAR, data), interrupted, recipe, job.work / "cifar.pt")
    again = train_cifar(folder, "again")
    assert json.loads((again / "figures.json").read_text())["steps"] == 6
    one, two = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (trained, again))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-3, rtol=1e-2, msg=key)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_a_larger_budget_and_says_so(folder: Path) -> None:
    train_cifar(folder, "longer", "--steps", 4)
    assert "larger budget" not in (folder / "longer" / "README.md").read_text()
    train_cifar(folder, "longer", "--steps", 8)
    assert json.loads((folder / "longer" / "figures.json").read_text())["steps"] == 8
    assert "At step 4 a larger budget took the rate up to 0.062 again." in (folder / "longer" / "README.md").read_text()


def test_emoji_are_measured_on_held_out_pictures(folder: Path) -> None:
    out = folder / "emoji"
    arguments = ("--data", folder / "drawings.zip", "--work", folder / "emoji-work", "--out", out)
    result = run("emoji", *arguments, "--steps", 2, "--batch", 6)
    assert result.exit_code == 0, result.output
    figures = json.loads((out / "figures.json").read_text())
    assert (figures["train_pictures"], figures["held_out_pictures"], figures["held_out_classes"]) == (30, 6, 3)
    assert "6 held-out pictures of 3 classes" in (out / "README.md").read_text()
    assert load_extractor("emoji-classifier", out).input_size == 48


def test_training_learns(folder: Path) -> None:
    data = load(folder / "train.zip", 32, "label", folder / "cifar-work")
    torch.manual_seed(0)
    model = Classifier(3, 32, (8, 8, 8), 6)
    model.stem.weight.data.copy_(whitening_filters(data.images, 6))
    train(model, photo_batches(data, 12, 0), Recipe(Budget(steps=30), batch=12, lr=0.05), folder / "learn.pt")
    with torch.no_grad():
        logits = model(data.images / 127.5 - 1)
    assert accuracy(logits, data.labels) > 90
    assert not model.training


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = Classifier(3, 8, (4, 4, 4), 2)
    model.head.weight.data.fill_(torch.nan)
    batch = lambda step, rng: (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))  # noqa: E731
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        train(model, batch, Recipe(Budget(steps=3), batch=2, log_every=-1), tmp_path / "x.pt")


def test_pictures_are_decoded_once(folder: Path, tmp_path: Path) -> None:
    path = photos(tmp_path / "photos.zip", 6)
    first = load(path, 16, "label", tmp_path / "cache")
    assert first.images.shape == (6, 3, 16, 16)
    assert first.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert first.names == ("colour0", "colour1", "colour2")
    stored = tmp_path / "cache" / "photos-16.safetensors"
    when = stored.stat().st_mtime_ns
    assert torch.equal(load(path, 16, "label", tmp_path / "cache").images, first.images)
    assert stored.stat().st_mtime_ns == when
    photos(path, 9)
    assert len(load(path, 16, "label", tmp_path / "cache")) == 9


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/0.png", b"no picture")
        archive.writestr("dataset.json", json.dumps({"labels": [["cat/0.png", 0]]}))
    with pytest.raises(ValueError, match=r"broken.zip holds a picture that cannot be read: cat/0.png"):
        load(path, 16, "label", tmp_path)


def test_held_out_pictures_are_every_nth_of_their_class() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 2])
    trained, held_out = split_classes(labels, 2)
    assert held_out.tolist() == [2, 3, 6]
    assert trained.tolist() == [0, 1, 4, 5, 7]


def noise(count: int, size: int) -> Labelled:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=rng).to(torch.uint8)
    return Labelled(images, torch.arange(count), tuple(map(str, range(count))))


def test_photos_are_shifted_and_mirrored_in_turns() -> None:
    data = noise(4, 8)
    still = photo_batches(data, 4, 0, shift=0)
    first, second, third = (still(step, step_rng(0, step)) for step in range(3))
    for x, y in (first, second):
        assert sorted(y.tolist()) == [0, 1, 2, 3]
        for seen, label in zip(x, y, strict=True):
            real = data.images[label] / 127.5 - 1
            assert torch.allclose(seen, real) or torch.allclose(seen, real.flip(-1))
    by_label = lambda batch: batch[0][batch[1].argsort()]  # noqa: E731
    torch.testing.assert_close(by_label(second), by_label(first).flip(-1))
    torch.testing.assert_close(by_label(third), by_label(first))
    moved, labels = photo_batches(data, 4, 0)(0, step_rng(0, 0))
    assert not torch.equal(moved, first[0])
    values = {round(v, 4) for v in (data.images[labels[0]] / 127.5 - 1).flatten().tolist()}
    assert {round(v, 4) for v in moved[0].flatten().tolist()} <= values  # only its own pixels


def test_white_stays_white_and_drawings_stay_in_range() -> None:
    white = Labelled(torch.full((4, 3, 64, 64), 255, dtype=torch.uint8), torch.zeros(4).long(), ("white",))
    assert torch.all(drawing_batches(white, 4, 0, 48)(0, step_rng(0, 0))[0] == 1)
    x, _ = drawing_batches(noise(4, 64), 4, 0, 48)(0, step_rng(0, 0))
    assert x.shape == (4, 3, 48, 48)
    assert x.min() >= -1
    assert x.max() <= 1
    assert not torch.equal(x, drawing_batches(noise(4, 64), 4, 0, 48)(1, step_rng(0, 1))[0])


def test_whitened_patches_are_uncorrelated_with_variance_one() -> None:
    images = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(3) / 16
    weight = whitening_filters((images * 255).to(torch.uint8), 10, eps=0.0)
    patches = torch.nn.functional.conv2d((images * 255).to(torch.uint8) / 127.5 - 1, weight, stride=4)
    cov = patches.permute(1, 0, 2, 3).flatten(1).cov()
    torch.testing.assert_close(cov, torch.eye(10), atol=1e-3, rtol=0)


def test_the_learning_rate_is_a_triangle_over_the_budget() -> None:
    recipe = Recipe(Budget(steps=100), lr=1.0, warmup=0.2)
    rates = [recipe.rate(Progress(step=s).done(recipe.budget)) for s in range(101)]
    assert max(rates) == rates[20] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.5)
    assert rates[100] == rates[0] == pytest.approx(0.01)


def test_a_budget_must_be_positive(folder: Path) -> None:
    result = run("emoji", "--data", folder / "drawings.zip", "--minutes", 0)
    assert result.exit_code == 2
    assert "budget must be positive" in result.output

"""`diffattn evaluate` and `diffattn evaluate compare`: what they print and write, and their exit codes."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import tiny, web
from support.commands import call
from support.tiny_metrics import random_pictures

from diffattn.metrics.adm import read_pictures, write_pictures
from diffattn.metrics.classifier import Classifier
from diffattn.metrics.lpips import alexnet
from diffattn.sampling import SiTPipeline

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing


pictures = partial(random_pictures, size=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sit and sd, tiny models; a.npz and b.npz of 16x16 pixels; extractor and alexnet, weights; prompts.txt."""
    found = tmp_path_factory.mktemp("evaluate")
    web.save_sits(found, "sit")
    tiny.pipeline("sd", found / "tokenizer").save_pretrained(found / "sd")
    write_pictures(found / "a.npz", pictures(8))
    write_pictures(found / "b.npz", pictures(10, seed=1) // 2)
    write_pictures(found / "large.npz", pictures(6, size=32))
    write_pictures(found / "one.npz", pictures(1))
    broken = SiTPipeline.from_pretrained(found / "sit")
    torch.nn.init.constant_(next(broken.transformer.parameters()), torch.nan)
    broken.save_pretrained(found / "broken")
    torch.manual_seed(0)
    Classifier(5, 16, (6, 8, 10), 8, "CIFAR-10").save_pretrained(found / "extractor")
    save_file({f"features.{name}": x for name, x in alexnet().state_dict().items()}, found / "alexnet.safetensors")
    (found / "prompts.txt").write_text("a cat\n\na dog\n")
    (found / "empty.txt").write_text("\n \n")
    return found


@pytest.fixture
def files(place: Path) -> tuple[object, ...]:
    """Words for pictures from files and their extractor."""
    return ("evaluate", "--pictures", place / "a.npz", "--reference", place / "b.npz", "--extractor",
            "cifar-classifier", "--extractor-weights", place / "extractor", "--device", "cpu")  # fmt: skip


@pytest.mark.slow
def test_a_text_model_with_everything(place: Path, tmp_path: Path) -> None:
    words = ("evaluate", "--model", place / "sd", "--prompts", place / "prompts.txt", "--num-pictures", 3, "--steps", 2,
             "--reference", place / "large.npz", "--extractor", "cifar-classifier", "--extractor-weights",
             place / "extractor", "--paired", "--option", "min_tokens=0", "--option", "num_agents=4", "--option",
             "agent_ratio=none", "--lpips-weights", place / "alexnet.safetensors", "--device", "cpu", "--seed", 5,
             "--out", tmp_path / "run", "--save-npz", tmp_path / "a.npz", "--json", tmp_path / "a.json")  # fmt: skip
    done = call(*words)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "a.json").read_text())
    assert {"fid", "kid", "sfid", "psnr", "ssim", "foreground_psnr", "lpips", "latent_error"} <= set(result["scores"])
    assert result["protocol"]["seeds"] == "5..7"
    assert result["protocol"]["guidance"] == 7.5
    assert len(result["protocol"]["options"]["lpips"]) == 64
    assert len(result["details"]["latent_error_by_step"]) == 2
    assert "agent balanced" in result["subject"]
    assert "FID-3 (cifar-classifier, large.npz)" in done.stdout
    assert "knows only CIFAR-10" in done.stdout
    assert read_pictures(tmp_path / "a.npz").shape == (3, 3, 32, 32)
    assert len(list((tmp_path / "run" / "unaccelerated").glob("*.png"))) == 3
    worst = result["details"]["worst_pairs"]
    assert worst["by"] == "lpips"
    assert f"{worst['worst'][0]['lpips']:.5g}  {worst['worst'][0]['title']}" in done.stdout
    assert f"look at them: {tmp_path / 'run' / 'worst_pairs.png'}" in done.stdout
    assert {pair["title"] for pair in worst["worst"]} == {"a cat, seed 5", "a dog, seed 6", "a cat, seed 7"}
    again = call(*words)  # all is there
    assert again.exit_code == 0
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_compare_and_what_it_refuses(place: Path, files: tuple[object, ...], tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    for file, more in ((a, ()), (b, ("--pictures", place / "b.npz", "--num-pictures", 8)), (c, ("--num-pictures", 6))):
        done = call(*files, *more, "--out", tmp_path / file.stem, "--json", file)
        assert done.exit_code == 0, done.output
    done = call("evaluate", "compare", a, b, "--json", tmp_path / "d.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["b_minus_a"]["fid"] == pytest.approx(found["b"]["scores"]["fid"] - found["a"]["scores"]["fid"])
    assert "A: a.npz" in done.stdout
    assert {name: x["verdict"] for name, x in found["differences"].items()} == {
        "fid": "B better", "kid": "no difference shown", "sfid": "B better", "precision": "not known",
        "recall": "not known",
    }  # fmt: skip
    assert all(found["differences"]["fid"]["interval"])
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert rows[0][:4] == ["score", "A", "B", "B"]
    assert ["fid", "B", "better"] in [[row[0], *row[-2:]] for row in rows]
    itself = call("evaluate", "compare", a, a)
    assert itself.stdout.count("no difference shown") == 3
    refused = call("evaluate", "compare", a, c)
    assert refused.exit_code == 2
    assert "protocols differ in num_pictures: 8 and 6; options.kid_subset_size: 4 and 3" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert call("evaluate", "compare", a, c, "--may-differ", "num_pictures,options").exit_code == 0
    wrong = call("evaluate", "compare", a, c, "--may-differ", "speed")
    assert "the protocol has no speed" in wrong.stderr
    (tmp_path / "other.json").write_text("{}")
    assert "not a quality result" in call("evaluate", "compare", a, tmp_path / "other.json").stderr


@pytest.mark.skipif(sys.platform != "linux", reason="pictures are opened by xdg-open on Linux")
def test_the_sheet_is_opened_on_demand(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = tmp_path / "bin" / "xdg-open"
    viewer.parent.mkdir()
    viewer.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/opened\n')
    viewer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{viewer.parent}:/usr/bin:/bin")
    words = ("evaluate", "--pictures", place / "a.npz", "--paired-with", place / "a.npz", "--device", "cpu")
    assert call(*words, "--out", tmp_path / "quiet").exit_code == 0
    shown = call(*words, "--out", tmp_path / "run", "--show")
    assert shown.exit_code == 0
    assert "identical  arr_0[0]" in shown.stdout
    until = time.monotonic() + 60
    while not (tmp_path / "opened").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "opened").read_text().strip() == str(tmp_path / "run" / "worst_pairs.png")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no picture viewer could be opened" in call(*words, "--out", tmp_path / "run", "--show").stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved/b.safetensors", "b.npz"])
def test_a_reference_is_made_once(place: Path, files: tuple[object, ...], tmp_path: Path, name: str) -> None:
    eye = ("--extractor", "cifar-classifier", "--extractor-weights", place / "extractor", "--device", "cpu")
    made = call("evaluate", "reference", place / "b.npz", tmp_path / name, *eye)
    assert made.exit_code == 0, made.output
    assert "10 pictures, cifar-classifier: written to" in made.stdout
    fids = []
    for folder, reference in (("pictures", place / "b.npz"), ("made", tmp_path / name)):
        done = call(*files, "--reference", reference, "--out", tmp_path / folder)
        assert done.exit_code == 0, done.output
        scores = json.loads((tmp_path / folder / "result.json").read_text())["scores"]
        assert ("kid" in scores) == (reference != tmp_path / "b.npz")
        fids.append(scores["fid"])
    assert fids[0] == pytest.approx(fids[1], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("b.npz", "x.pt"), "saved as .safetensors or .npz, got"),
        (("one.npz", "x.npz"), "at least 2 pictures are needed"),
        (("b.npz", "x.npz", "--num-pictures", "0"), "2 or more, got 0"),
        (("no.npz", "x.npz"), "no.npz' is not a readable .npz file"),
    ],
)
def test_bad_references_are_one_line(place: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    source, out, *more = words
    done = call("evaluate", "reference", place / source, tmp_path / out, *more, "--extractor", "cifar-classifier",
                "--extractor-weights", place / "extractor", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 2, done.output
    assert message in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_skip_bad(place: Path, files: tuple[object, ...], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, x in enumerate(pictures(5)):
        Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"broken")
    words = (*files, "--pictures", folder, "--out", tmp_path / "run")
    done = call(*words)
    assert done.exit_code == 2
    assert "1 of 5 pictures in 'pictures' cannot be read: '2.png'" in done.stderr
    with pytest.warns(UserWarning, match="1 of 5 pictures in 'pictures' cannot be read and are left out: '2.png'"):
        skipped = call(*words, "--skip-bad")
    assert skipped.exit_code == 0
    assert "pictures: 4 pictures" in skipped.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either --model (to draw pictures) or --pictures"),
        (("--model", "sit", "--pictures", "a.npz"), "give either --model"),
        (("--pictures", "a.npz"), "there is nothing to measure"),
        (("--pictures", "a.npz", "--paired"), "leave out --paired, or give --model instead"),
        (("--pictures", "a.npz", "--paired-with", "a.npz", "--steps", 3, "--seed", 0, "--dtype", "auto"),
         "--pictures are not drawn: leave out --steps, --seed, --dtype, or give --model instead"),
        (("--pictures", "a.npz", "--paired-with", "a.npz", "--width", 0, "--height", 0, "--guidance", 0, "--batch", 1),
         "leave out --guidance, --width, --height, --batch, or give"),
        (("--pictures", "a.npz", "--reference", "b.npz", "--variant", "fp16", "--method", "agent", "--preset", "fast",
          "--option", "x=1", "--recipe", "x"), "leave out --variant, --method, --preset, --option, --recipe, or give"),
        (("--pictures", "a.npz", "--paired", "--paired-with", "b.npz"), "either --paired or --paired-with"),
        (("--pictures", "a.npz", "--paired-with", "b.npz"), "as many pictures on both sides, got 8 and 10"),
        (("--pictures", "a.npz", "--reference", "b.npz"), "pip install 'diffattn[inception]'"),
        (("--pictures", "a.npz", "--reference", "b.npz", "--extractor", "vgg"), "unknown extractor 'vgg'; choose from"),
        (("--pictures", "a.npz", "--reference", "b.npz", "--extractor", "dinov2", "--extractor-weights", "sit"),
         "safetensors weights of a Dinov2Model"),
        (("--pictures", "a.npz", "--reference", "large.npz", "--extractor", "cifar-classifier"),
         "16x16 pixels, the reference 32x32; bring both to one size (--size)"),
        (("--pictures", "a.npz", "--clip", "sit", "--prompts", "empty.txt"), "has no prompts"),
        (("--pictures", "a.npz", "--clip", "sit", "--prompts", "prompts.txt"), "no CLIP model could be loaded"),
        (("--pictures", "a.npz", "--clip", "sit"), "need the prompts"),
        (("--pictures", "a.npz", "--clip-i", "sit"), "there are no pairs for clip_i: give paired, or pictures to"),
        (("--pictures", "a.npz", "--reference", "b.npz", "--lpips-weights", "alexnet.safetensors"),
         "there are no pairs for lpips_weights"),
        (("--model", "sd", "--prompts", "prompts.txt", "--paired-with", "a.npz", "--width", 33),
         "width 33 is not a positive multiple of 8 pixels; nearest: 32 or 40"),
        (("--model", "sd", "--prompts", "prompts.txt", "--paired-with", "a.npz", "--width", 0, "--height", 64),
         "width 0 is not a positive multiple of 8"),
        (("--model", "sd", "--prompts", "prompts.txt", "--paired-with", "a.npz", "--width", 64, "--height", -64),
         "height -64 is not a positive multiple of 8"),
        (("--model", "sit", "--paired", "--method", "mediator", "--option", "recipe=x"), "unknown option recipe of"),
        (("--pictures", "a.npz", "--paired-with", "a.npz", "--dino-i", "sit"), "no DINO model could be loaded"),
        (("--pictures", "no.npz", "--paired-with", "b.npz"), "no.npz' is not a readable .npz file"),
        (("--pictures", "a.npz", "--paired-with", "a.npz", "--worst-pairs", -1), "0 or more, got -1"),
        (("--model", "sit", "--num-pictures", 1, "--reference", "b.npz"), "must be 2 or more, got 1"),
        (("--model", "sit", "--paired", "--method", "none"), "takes no --paired"),
        (("--model", "sit", "--paired", "--method", "agent", "--option", "x"), "not of the form key=value"),
        (("--model", "sit", "--paired", "--option", "zap=1"), "zap"),
        (("--model", "sd", "--paired", "--option", "min_tokens=0"), "needs prompts (--prompts FILE)"),
        (("--model", "sd", "--paired", "--prompts", "no.txt"), "cannot be read"),
        (("--model", "emoji-sd", "--reference", "b.npz", "--extractor", "cifar-classifier"), "use its own, 'emoji"),
        (("--pictures", "one.npz", "--reference", "b.npz", "--extractor", "cifar-classifier"), "at least 2 pictures"),
        (("--pictures", "a.npz", "--reference", "one.npz", "--extractor", "cifar-classifier"), "at least 2 pictures"),
        (("--pictures", "a.npz", "--reference", "b.npz", "--extractor", "cifar-classifier", "--extractor-weights",
          "alexnet.safetensors"), "has no weights in"),
        (("--model", "sd", "--paired", "--prompts", "empty.txt"), "has no prompts"),
        (("--pictures", "a.npz", "--paired-with", "a.npz", "--num-pictures", -3), "2 or more, got -3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)  # fmt: skip
def test_bad_input_is_one_line(place: Path, tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    names = {"sit", "sd", "a.npz", "b.npz", "large.npz", "one.npz", "empty.txt", "prompts.txt", "alexnet.safetensors"}
    given = [place / str(word) if word in names else word for word in words]
    done = call("evaluate", *given, "--device", "cpu", "--out", tmp_path / "run")
    assert done.exit_code == 2, done.output
    assert message in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("side", "size"), [("--width", (64, 32)), ("--height", (32, 64))])
def test_one_side_is_enough_for_a_size(place: Path, tmp_path: Path, side: str, size: tuple[int, int]) -> None:
    """diffusers' pipelines draw their own size if they are given one side only."""
    width, height = size
    write_pictures(tmp_path / "pairs.npz", random_pictures(2, size=64)[:, :, :height, :width])
    done = call("evaluate", "--model", place / "sd", "--prompts", place / "prompts.txt", "--num-pictures", 2, "--steps",
                1, side, 64, "--paired-with", tmp_path / "pairs.npz", "--device", "cpu",
                "--out", tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {Image.open(file).size for file in (tmp_path / "run/pictures").glob("*.png")} == {size}
    drawn = json.loads((tmp_path / "run/run.json").read_text())["draw"]
    assert (drawn["width"], drawn["height"]) == size


def test_nan_pictures_are_one_line(place: Path, tmp_path: Path) -> None:
    done = call("evaluate", "--model", place / "broken", "--reference", place / "b.npz", "--extractor",
                "cifar-classifier", "--num-pictures", 2, "--steps", 2, "--device", "cpu",
                "--out", tmp_path)  # fmt: skip
    assert done.exit_code == 2, done.output
    assert (
        "all 2 pictures have NaN or infinite values and are left out of the scores (seeds 0, 1)"
        in done.stderr.strip().splitlines()[-1]
    )


def test_pictures_outside_the_extractors_domain_get_a_note(files: tuple[object, ...], tmp_path: Path) -> None:
    """The offline extractors take any pictures; the printed note and the stored result say what that is worth."""
    done = call(*files, "--out", tmp_path / "run", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    note = "the extractor knows only CIFAR-10; its scores mean nothing for others"
    assert note in done.stdout.splitlines()
    assert json.loads((tmp_path / "a.json").read_text())["details"]["domain"] == "CIFAR-10"


def test_help_names_everything() -> None:
    found = call("evaluate", "--help")
    assert found.exit_code == 0
    for option in ("--model", "--pictures", "--reference", "--clip", "--paired", "--lpips-weights", "--skip-bad",
                   "--save-npz", "--extractor", "--json", "compare", "--pickscore", "--clip-i", "--dino-i",
                   "drawbench", "--worst-pairs", "--show"):  # fmt: skip
        assert option in found.stdout
    assert call("evaluate", "compare", "--help").exit_code == 0

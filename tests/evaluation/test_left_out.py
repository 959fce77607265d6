"""Unusable pictures: blanked by a safety checker, NaN or infinite. They are counted, named and not scored."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import faulty, tiny
from typer.testing import CliRunner

from diffattn.cli import app
from diffattn.evaluation import DrawConfig, EvaluateConfig, evaluate
from diffattn.evaluation.picture_set import open_pictures
from diffattn.evaluation.quality import QualityResult
from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import OfflineExtractor

AGENTS: dict[str, Any] = {
    "method": "agent",
    "num_agents": 4,
    "agent_ratio": None,
    "max_head_error": 10.0,
    "min_tokens": 0,
}
DRAW = DrawConfig(num_pictures=6, prompts=["a cat", "a z", "a hat"], steps=2, batch=2, seed=10)


@pytest.fixture(scope="module")
def config() -> EvaluateConfig:
    torch.manual_seed(0)
    return EvaluateConfig(OfflineExtractor("cifar-classifier", Classifier(5, 16, (6, 8, 10), 8, "CIFAR-10").eval()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("left_out")
    (found / "real").mkdir()
    for i in range(8):
        noise = torch.randint(256, (tiny.SIZE, tiny.SIZE, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(found / "real" / f"{i}.png")
    return found


@pytest.fixture
def pipe(place: Path) -> Any:
    return tiny.pipeline("sd", place / "tokenizer")


def drawn(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


@pytest.mark.slow
def test_pictures_that_are_nan_are_counted_named_and_not_scored(
    pipe: Any, place: Path, tmp_path: Path, config: EvaluateConfig
) -> None:
    faulty.spoil_word(pipe)
    with pytest.warns(UserWarning, match=r"^2 of 6 pictures have NaN or infinite .* left out .* \(seeds 11, 14\)$"):
        found = evaluate(pipe, place / "real", folder=tmp_path / "run", config=config, draw=DRAW)
    assert found.details["not_finite"] == {"pictures": [11, 14]}
    assert found.protocol.num_pictures == 4
    assert drawn(tmp_path / "run" / "pictures") == [f"{i:07d}.png" for i in (0, 2, 3, 5)]
    alone = evaluate(tmp_path / "run" / "pictures", place / "real", folder=tmp_path / "alone", config=config)
    assert found.scores == pytest.approx(alone.scores)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["details"]["not_finite"] == {"pictures": [11, 14]}
    with pytest.warns(UserWarning, match="2 of 6 pictures"):
        assert evaluate(pipe, place / "real", folder=tmp_path / "run", config=config, draw=DRAW) == found


@pytest.mark.slow
def test_a_pair_needs_both_of_its_pictures(pipe: Any, tmp_path: Path) -> None:
    plain = evaluate(pipe, folder=tmp_path / "plain", draw=DRAW, acceleration=AGENTS, paired=True)
    faulty.spoil_word(pipe)
    with pytest.warns(UserWarning, match="2 of 6 unaccelerated pictures have NaN"):
        found = evaluate(pipe, folder=tmp_path / "run", draw=DRAW, acceleration=AGENTS, paired=True)
    assert found.details["not_finite"] == {"pictures": [11, 14], "unaccelerated": [11, 14]}
    assert found.details["pairs"]["psnr"]["pairs"] == 4
    assert found.scores["psnr"] != pytest.approx(plain.scores["psnr"])
    assert np.isfinite(found.details["latent_error_by_step"]).all()
    folder = tmp_path / "plain" / "unaccelerated"
    with pytest.warns(UserWarning, match="2 of 6 pictures have NaN"):
        given = evaluate(pipe, folder=tmp_path / "given", draw=DRAW, acceleration=AGENTS, paired=folder)
    assert given.scores["psnr"] == pytest.approx(found.scores["psnr"])


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [faulty.spoil_unet, faulty.spoil_vae])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_but_nan_is_an_error(pipe: Any, tmp_path: Path, spoil: Any, value: float) -> None:
    spoil(pipe, value)
    said = r"all 6 pictures have NaN .*: 0 left to score, at least 2 are needed; check the weights"
    with pytest.raises(ValueError, match=said):
        evaluate(pipe, folder=tmp_path / "run", draw=DRAW, acceleration=AGENTS, paired=True)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_blanked_pictures_are_counted_named_and_not_scored(
    pipe: Any, place: Path, tmp_path: Path, config: EvaluateConfig
) -> None:
    evaluate(pipe, folder=tmp_path / "before", draw=DRAW, acceleration=AGENTS, paired=True)
    with Image.open(tmp_path / "before" / "unaccelerated" / "0000003.png") as image:
        faulty.add_checker(pipe, blanks=image.convert("RGB"))
    with pytest.warns(UserWarning, match="of 6 unaccelerated pictures were blanked by the safety checker"):
        found = evaluate(
            pipe, place / "real", folder=tmp_path / "run", config=config, draw=DRAW, acceleration=AGENTS, paired=True
        )
    seeds = {seed for seeds in found.details["blanked"].values() for seed in seeds}
    assert 13 in found.details["blanked"]["unaccelerated"]
    assert found.protocol.num_pictures == found.details["pairs"]["psnr"]["pairs"] == 6 - len(seeds)
    exact = open_pictures(tmp_path / "run" / "unaccelerated")
    assert not exact.batch(3, 4).any()  # the file shows what the pipeline gave
    faulty.add_checker(pipe, everything=True)
    with pytest.raises(ValueError, match=r"all 6 pictures were blanked .*; choose other prompts, or load the pipeline"):
        evaluate(pipe, place / "real", folder=tmp_path / "all", config=config, draw=DRAW)


@pytest.mark.slow
def test_nothing_is_left_out_of_a_sound_run(pipe: Any, tmp_path: Path) -> None:
    faulty.add_checker(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = evaluate(pipe, folder=tmp_path / "run", draw=DRAW, acceleration=AGENTS, paired=True)
    assert not {"blanked", "not_finite"} & set(found.details)
    assert found == QualityResult.from_dict(json.loads((tmp_path / "run" / "result.json").read_text()))


@pytest.mark.slow
def test_guidance_that_is_not_given_is_the_pipelines_own(pipe: Any, place: Path, tmp_path: Path) -> None:
    xl: Any = tiny.pipeline("sdxl", place / "tokenizer")
    draw = replace(DRAW, num_pictures=2)
    found = evaluate(xl, folder=tmp_path / "run", draw=draw, acceleration=AGENTS, paired=True)
    assert found.protocol.guidance == 5.0
    own = xl("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(10)).images[0]
    with Image.open(tmp_path / "run" / "unaccelerated" / "0000000.png") as image:
        assert np.abs(np.asarray(image).astype(int) - np.asarray(own).astype(int)).max() <= 1
    red = evaluate(
        pipe, folder=tmp_path / "red", draw=replace(draw, call={"negative_prompt": "red"}), acceleration=AGENTS,
        paired=True,
    )  # fmt: skip
    assert red.protocol.options["call.negative_prompt"] == "'red'"


@pytest.mark.slow
def test_the_program_says_so_and_does_not_end_with_0(pipe: Any, place: Path, tmp_path: Path) -> None:
    faulty.spoil_word(pipe)
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na z\na hat\n")
    given = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--num-pictures", 6, "--steps", 2,
             "--device", "cpu", "--paired", "--option", "min_tokens=0", "--out", tmp_path / "run",
             "--json", tmp_path / "result.json"]  # fmt: skip
    with pytest.warns(UserWarning, match="2 of 6 pictures have NaN"):
        found = CliRunner().invoke(app, ["evaluate", *map(str, given)])
    assert found.exit_code == 1
    assert re.search(r"DDIMScheduler, 2 steps, guidance 7.5, seeds 0\.\.5", found.output)
    assert json.loads((tmp_path / "result.json").read_text())["details"]["not_finite"]["pictures"] == [1, 4]
    generate = ["generate", "--model", str(tmp_path / "model"), "--prompt", "a z", "--steps", "2", "--device", "cpu"]
    found = CliRunner().invoke(app, [*generate, "--method", "none", "--out", str(tmp_path / "x.png")])
    assert found.exit_code == 2
    assert not (tmp_path / "x.png").exists()

"""CLIP score with a tiny random CLIP from a folder."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny
from support.tiny_metrics import random_pictures
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffattn.evaluation import EvaluateConfig, evaluate
from diffattn.metrics.adm import write_pictures
from diffattn.metrics.clip_score import ClipScore

PROMPTS = ["a cat", "a red dog", "two ships"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip(tmp_path_factory.mktemp("clip"))


pictures = partial(random_pictures, size=20)


def test_equals_the_formula_with_both_towers_apart(folder: Path) -> None:
    score, x = ClipScore(folder), pictures(3)
    found = score(x, PROMPTS)
    vision, text = (
        kind.from_pretrained(folder).eval() for kind in (CLIPVisionModelWithProjection, CLIPTextModelWithProjection)
    )
    words, processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            a = vision(**processor(Image.fromarray(x[i].permute(1, 2, 0).numpy()), return_tensors="pt")).image_embeds
            b = text(**words(prompt, return_tensors="pt")).text_embeds
            expected = 100 * (a @ b.T) / (a.norm() * b.norm())
            assert found[i].item() == pytest.approx(max(expected.item(), 0), abs=1e-3)
    assert found.min() > 0
    torch.testing.assert_close(score(x[1:2], PROMPTS[1:2]), found[1:2])
    assert score(x[:1], ["a very long prompt " * 20]).shape == (1,)
    with pytest.raises(ValueError, match="as many prompts as pictures, got 3 and 2"):
        score(x[:2], PROMPTS)
    score.model.visual_projection.weight.data.neg_()
    assert score(x, PROMPTS).tolist() == [0, 0, 0]


def test_every_picture_has_its_own_prompt(folder: Path, tmp_path: Path) -> None:
    x, score = pictures(4), ClipScore(folder)
    write_pictures(tmp_path / "a.npz", x)
    config = EvaluateConfig(clip=folder, prompts=PROMPTS)
    result = evaluate(tmp_path / "a.npz", folder=tmp_path / "run", config=config)
    expected = score(x, [*PROMPTS, PROMPTS[0]]).mean().item()
    assert result.scores == pytest.approx({"clip": expected})
    assert (result.protocol.extractor, result.protocol.reference) == ("none", "none")
    assert result.protocol.options["clip"] == score.hash
    other = evaluate(tmp_path / "a.npz", folder=tmp_path / "other", config=EvaluateConfig(clip=folder, prompts=["x"]))
    assert other.protocol.differences(result.protocol).keys() == {"options"}


def test_what_is_no_clip_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no CLIP model could be loaded from .*openai/clip-vit-base-patch32"):
        ClipScore(tmp_path)


def test_half_a_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    """`transformers` would only log it, and the other half be random."""
    shutil.copytree(folder, tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.startswith("text")}
    save_file(kept, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks .* weights, such as text"):
        ClipScore(tmp_path / "half")

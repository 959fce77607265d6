"""PickScore, CLIP-I and DINO-I with tiny random models from folders, against numbers computed by hand."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny
from support.tiny_metrics import random_pictures
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from diffattn.evaluation import EvaluateConfig, evaluate
from diffattn.metrics.adm import write_pictures
from diffattn.metrics.extractors import load_extractor
from diffattn.metrics.pick_score import PickScore
from diffattn.metrics.similarity import ImageSimilarity, clip_similarity, dino_similarity

PROMPTS = ["a cat", "a red dog", "two ships"]
SIDE = 16  # of pictures, as the networks take them: nothing is resized
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
CLIP = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[:, :, None, None]


pictures = partial(random_pictures, size=SIDE)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With another temperature than CLIP's own 100."""
    place = tiny.clip(tmp_path_factory.mktemp("clip"))
    model = CLIPModel.from_pretrained(place)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: without the pooling layer that `ViTModel` adds by default, and that would be random."""
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp("dino")
    ViTModel(ViTConfig(**SMALL, patch_size=8), add_pooling_layer=False).save_pretrained(place)  # type: ignore[arg-type]
    return place


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    place = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(**SMALL, patch_size=8)).save_pretrained(place)  # type: ignore[arg-type]
    return place


def test_pickscore_is_the_temperature_times_the_cosine(clip: Path) -> None:
    x, score = pictures(3), PickScore(clip)
    model: Any = CLIPModel.from_pretrained(clip).eval()
    words: Any = CLIPTokenizer.from_pretrained(clip)
    processor: Any = CLIPImageProcessor.from_pretrained(clip)
    expected = []
    with torch.no_grad():
        for picture, prompt in zip(x, PROMPTS, strict=True):
            image = processor(Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()), return_tensors="pt")
            a = model.visual_projection(model.vision_model(**image).pooler_output)[0]
            b = model.text_projection(model.text_model(**words(prompt, return_tensors="pt")).pooler_output)[0]
            expected.append(20.0855 * (a @ b).item() / (a.norm() * b.norm()).item())  # e³
    assert score(x, PROMPTS).tolist() == pytest.approx(expected, rel=1e-3)
    assert len(set(expected)) == 3
    score.clip.model.visual_projection.weight.data.neg_()
    assert score(x, PROMPTS).tolist() == pytest.approx([-value for value in expected], rel=1e-3)  # unlike CLIP score
    with pytest.raises(ValueError, match="as many prompts as pictures"):
        score(x, PROMPTS[:2])


def features(model: Any, x: Tensor, moments: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()((x / 255 - moments[0]) / moments[1])


def cosines(x: Tensor, y: Tensor) -> list[float]:
    return [(a @ b / (a @ a * (b @ b)).sqrt()).item() for a, b in zip(x, y, strict=True)]


def test_clip_i_is_the_cosine_of_the_embeddings(clip: Path) -> None:
    a, b = pictures(3), pictures(3, seed=1)
    model: Any = CLIPVisionModelWithProjection.from_pretrained(clip)
    x, y = (features(model, pictures_, CLIP).image_embeds for pictures_ in (a, b))  # type: ignore[attr-defined]
    assert clip_similarity(clip)(a, b).tolist() == pytest.approx(cosines(x, y), abs=1e-5)


def test_dino_i_is_the_cosine_of_the_class_tokens(dino: Path, dinov2: Path) -> None:
    a, b = pictures(3), pictures(3, seed=1)
    models: list[tuple[Path, Any]] = [
        (dino, ViTModel.from_pretrained(dino, add_pooling_layer=False)), (dinov2, Dinov2Model.from_pretrained(dinov2))
    ]  # fmt: skip
    found = []
    for place, model in models:
        x, y = (features(model, z, IMAGENET).last_hidden_state[:, 0] for z in (a, b))  # type: ignore[attr-defined]
        found.append(dino_similarity(place)(a, b).tolist())
        assert found[-1] == pytest.approx(cosines(x, y), abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-3)
    assert dino_similarity(dino).hash == dino_similarity(dino).hash  # nothing is left to chance


def test_identical_pictures_are_alike_and_near_ones_more_than_far_ones(clip: Path, dino: Path) -> None:
    a, other = pictures(3), pictures(3, seed=1)
    near = (a.float() * 0.98 + other.float() * 0.02).to(torch.uint8)
    for make, place in ((clip_similarity, clip), (dino_similarity, dino)):
        similarity = make(place)
        assert similarity(a, a).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
        assert (similarity(a, near) > similarity(a, other)).all()
        torch.testing.assert_close(similarity(a, other), similarity(other, a))
        with pytest.raises(ValueError, match="as many pictures on both sides, got 3 and 2"):
            similarity(a, a[:2])


def test_a_network_that_gives_nan_is_named(dinov2: Path) -> None:
    extractor = load_extractor("dinov2", dinov2)
    torch.nn.init.constant_(next(extractor.model.parameters()), torch.nan)
    with pytest.raises(ValueError, match="'dinov2' gave features that are NaN or infinite"):
        ImageSimilarity(extractor)(pictures(2), pictures(2))


def test_all_of_them_in_one_evaluation(clip: Path, dino: Path, tmp_path: Path) -> None:
    a, b = pictures(7), pictures(7, seed=1)
    write_pictures(tmp_path / "a.npz", a)
    write_pictures(tmp_path / "b.npz", b)
    config = EvaluateConfig(pickscore=clip, clip_i=clip, dino_i=dino, prompts=PROMPTS)
    found = evaluate(tmp_path / "a.npz", folder=tmp_path / "run", paired=tmp_path / "b.npz", config=config)
    pick, turns = PickScore(clip), (PROMPTS * 3)[:7]
    values = {"pickscore": pick(a, turns), "clip_i": clip_similarity(clip)(a, b), "dino_i": dino_similarity(dino)(a, b)}
    held = found.details["per_picture"]
    assert held["number"] == [*range(7)]
    for name, expected in values.items():
        assert found.scores[name] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert held[name] == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.protocol.options["pickscore"] == pick.hash
    assert found.protocol.options["clip_i"] == clip_similarity(clip).hash
    assert found.protocol.options["dino_i"] == dino_similarity(dino).hash
    assert "clip" not in found.scores
    config = EvaluateConfig(pickscore=clip, clip_i=clip, prompts=PROMPTS)
    with pytest.raises(ValueError, match="another protocol: dino_i"):
        evaluate(tmp_path / "a.npz", folder=tmp_path / "run", paired=tmp_path / "b.npz", config=config)


@pytest.mark.slow
def test_what_does_not_fit_says_what_to_give(clip: Path, dino: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no CLIP model could be loaded from .*such as yuvalkirstain/PickScore_v1"):
        PickScore(dino)
    with pytest.raises(ValueError, match=r"type vit or dinov2, and '.*' is 'clip'; give .*facebook/dinov2-base"):
        dino_similarity(clip)
    with pytest.raises(ValueError, match=r"no DINO model could be loaded from .*such as facebook/dinov2-base"):
        dino_similarity(tmp_path)
    weights = load_file(dino / "model.safetensors")
    del weights["layernorm.weight"]
    (tmp_path / "part").mkdir()
    shutil.copy(dino / "config.json", tmp_path / "part")
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks 1 weights, such as layernorm.weight"):
        dino_similarity(tmp_path / "part")
    with pytest.raises(ValueError, match="safetensors weights of a CLIPVisionModelWithProjection"):
        clip_similarity(tmp_path)
    write_pictures(tmp_path / "a.npz", pictures(2))
    config = EvaluateConfig(clip=clip, clip_i=clip, dino_i=dino, prompts=PROMPTS)
    with pytest.raises(ValueError, match="there are no pairs for clip_i and dino_i: give paired"):
        evaluate(tmp_path / "a.npz", folder=tmp_path / "run", config=config)
    with pytest.raises(ValueError, match="CLIP score and PickScore need the prompts"):
        evaluate(tmp_path / "a.npz", folder=tmp_path / "run", config=EvaluateConfig(pickscore=clip))

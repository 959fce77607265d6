"""`diffattn.evaluation.evaluate`: every input, every reference, pairs, interrupts, several processes, bad input."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import web
from support.tiny_metrics import random_pictures, tiny_extractor
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

import diffattn
from diffattn.evaluation import DrawConfig, EvaluateConfig, evaluate
from diffattn.evaluation.picture_set import open_pictures
from diffattn.evaluation.quality import Protocol, QualityResult, compare
from diffattn.evaluation.references import make_reference, open_reference
from diffattn.metrics.adm import read_pictures, write_pictures, write_statistics
from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import OfflineExtractor
from diffattn.metrics.reference import Reference
from diffattn.sampling import SiTPipeline

FOUR = {"method": "mediator", "num_mediators": 4}
DRAW = DrawConfig(num_pictures=7, steps=2, guidance=1.0, batch=2, seed=3)


@pytest.fixture(scope="module")
def extractor() -> OfflineExtractor:
    return tiny_extractor()


@pytest.fixture(scope="module")
def config(extractor: OfflineExtractor) -> EvaluateConfig:
    return EvaluateConfig(extractor)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sit, a tiny pipeline of 16x16 pixels; pictures/ and reference/, folders of as large ones."""
    found = tmp_path_factory.mktemp("evaluate")
    web.save_sits(found, "sit")
    save(found / "pictures", pictures(9))
    save(found / "reference", pictures(12, seed=1) // 2)
    return found


@pytest.fixture
def pipe(place: Path) -> SiTPipeline:
    found = SiTPipeline.from_pretrained(place / "sit")
    found.set_progress_bar_config(disable=True)
    return found


pictures = partial(random_pictures, size=16)


def save(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{i:03d}.png")
    return folder


# Pictures and references from files


@pytest.mark.slow
def test_an_adm_file_with_pictures_and_statistics_is_used_as_the_extractor_allows(
    place: Path, tmp_path: Path, config: EvaluateConfig, extractor: OfflineExtractor
) -> None:
    """Published references hold pictures, and the moments of Inception's features of many more."""
    images, features = pictures(12, seed=1) // 2, torch.rand(40, 2048, generator=torch.Generator().manual_seed(2))
    moments: dict[str, Any] = {"mu": features.mean(0).numpy(), "sigma": features.T.cov().numpy()}
    np.savez(tmp_path / "both.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), **moments)
    ours, plain = (
        evaluate(place / "pictures", reference, folder=tmp_path / reference.stem, config=config).scores["fid"]
        for reference in (tmp_path / "both.npz", place / "reference")
    )
    assert ours == pytest.approx(plain)
    published = SimpleNamespace(name="inception", num_features=2048, resize="", hash="x")
    source = open_reference(tmp_path / "both.npz", published)  # type: ignore[arg-type]
    assert source.stored is not None
    torch.testing.assert_close(source.stored.statistics.mean.float(), features.mean(0))
    assert source.pictures is not None
    assert len(source.pictures) == 12
    other = SimpleNamespace(name="dinov2", num_features=768, resize="", hash="x")
    assert open_reference(tmp_path / "both.npz", other).stored is None  # type: ignore[arg-type]


def test_sfid_has_its_layer_in_the_protocol_and_comes_from_adm_statistics_too(
    place: Path, tmp_path: Path, config: EvaluateConfig, extractor: OfflineExtractor
) -> None:
    mine, reference = place / "pictures", place / "reference"
    found = evaluate(mine, reference, folder=tmp_path / "pictures", config=config)
    assert found.protocol.options["sfid_layer"] == "second stage, 7 channels of 8x8"
    made, spatial = make_reference(open_pictures(reference), extractor)
    write_statistics(tmp_path / "made.npz", made.statistics, spatial)
    stored = evaluate(mine, tmp_path / "made.npz", folder=tmp_path / "stored", config=config)
    assert stored.scores["sfid"] == pytest.approx(found.scores["sfid"], rel=1e-6)
    assert stored.scores["fid"] == pytest.approx(found.scores["fid"], rel=1e-6)


@pytest.mark.slow
def test_folder_zip_and_npz_score_alike_and_as_torchmetrics(
    place: Path, tmp_path: Path, config: EvaluateConfig, extractor: OfflineExtractor
) -> None:
    sources = [place / "pictures", tmp_path / "a.zip", tmp_path / "a.npz"]
    subprocess.run([sys.executable, "-m", "zipfile", "-c", sources[1], sources[0]], check=True)
    write_pictures(sources[2], pictures(9))
    found = [evaluate(x, place / "reference", folder=tmp_path / x.suffix[1:], config=config) for x in sources]
    for other in found[1:]:
        assert other.scores == pytest.approx(found[0].scores, rel=1e-6)
    metric = FrechetInceptionDistance(feature=extractor)
    metric.update(pictures(12, seed=1) // 2, real=True)
    metric.update(pictures(9), real=False)
    assert found[0].scores["fid"] == pytest.approx(metric.compute().item(), rel=1e-4)
    assert set(found[0].scores) == {"fid", "kid", "kid_std", "precision", "recall", "sfid"}
    assert "15 sizes need 25 pictures" in found[0].details["left_out"]["fid_infinity"]
    protocol = found[0].protocol
    assert (protocol.num_pictures, protocol.reference_pictures, protocol.steps) == (9, 12, None)
    assert protocol.reference_hash == Reference.of("x", [pictures(12, seed=1) // 2], extractor).hash
    assert protocol.options["size"] == "16x16"
    stored = QualityResult.from_dict(json.loads((tmp_path / "zip" / "result.json").read_text()))
    assert compare(found[0], stored) == dict.fromkeys(found[0].scores, 0)


def test_enough_pictures_have_fid_infinity_and_a_set_is_no_distance_from_itself(
    tmp_path: Path, config: EvaluateConfig
) -> None:
    write_pictures(tmp_path / "a.npz", pictures(40))
    scores = evaluate(tmp_path / "a.npz", tmp_path / "a.npz", folder=tmp_path / "run", config=config).scores
    assert scores["fid"] == pytest.approx(0, abs=1e-5)
    assert scores["sfid"] == pytest.approx(0, abs=1e-4)
    assert scores["precision"] == scores["recall"] == 1
    assert abs(scores["fid_infinity"]) < scores["kid_std"] + 5


@pytest.mark.slow
def test_saved_references_and_adm_statistics(
    place: Path, tmp_path: Path, config: EvaluateConfig, extractor: OfflineExtractor
) -> None:
    direct = evaluate(place / "pictures", place / "reference", folder=tmp_path / "a", config=config).scores
    reference = Reference.of("noise", [pictures(12, seed=1) // 2], extractor)
    reference.save(tmp_path / "noise.safetensors")
    write_statistics(tmp_path / "noise.npz", reference.statistics)
    for number, source in enumerate((reference, tmp_path / "noise.safetensors")):
        scores = evaluate(place / "pictures", source, folder=tmp_path / f"b{number}", config=config).scores
        assert scores == pytest.approx({name: direct[name] for name in direct if name != "sfid"})
    found = evaluate(place / "pictures", tmp_path / "noise.npz", folder=tmp_path / "c", config=config)
    assert found.scores == pytest.approx({"fid": direct["fid"]})
    assert "mean and covariance only" in found.details["left_out"]["kid"]
    other = OfflineExtractor("cifar-classifier", Classifier(5, 16, (6, 8, 12), 8, "CIFAR-10"))
    with pytest.raises(ValueError, match="statistics of 10 features, and extractor 'cifar-classifier' has 12"):
        evaluate(place / "pictures", tmp_path / "noise.npz", folder=tmp_path / "d", config=EvaluateConfig(other))
    with pytest.raises(ValueError, match="was made with 'cifar-classifier'"):
        evaluate(place / "pictures", reference, folder=tmp_path / "d", config=EvaluateConfig(other))


def test_two_pictures_have_what_two_pictures_can_have(tmp_path: Path, place: Path, config: EvaluateConfig) -> None:
    write_pictures(tmp_path / "two.npz", pictures(2))
    found = evaluate(tmp_path / "two.npz", place / "reference", folder=tmp_path / "run", config=config)
    assert set(found.scores) == {"fid", "kid", "kid_std", "sfid"}
    assert "at least 4 pictures" in found.details["left_out"]["precision"]


# Pipelines


def drawn(folder: Path, kind: str = "pictures") -> Tensor:
    """[N, 3, H, W] in 0..1"""
    files = sorted((folder / kind).glob("*.png"))
    pixels = [torch.frombuffer(bytearray(Image.open(f).tobytes()), dtype=torch.uint8).view(16, 16, 3) for f in files]
    return torch.stack(pixels).permute(0, 3, 1, 2) / 255


@pytest.mark.slow
def test_a_pipeline_is_drawn_and_paired_with_itself_unaccelerated(
    pipe: SiTPipeline, place: Path, tmp_path: Path, config: EvaluateConfig
) -> None:
    npz = tmp_path / "a.npz"
    found = evaluate(
        pipe, place / "reference", folder=tmp_path / "run", config=config, draw=DRAW, acceleration=FOUR, paired=True,
        npz=npz,
    )  # fmt: skip
    draw: Any = pipe
    exact = [
        draw([i % 5], num_inference_steps=2, guidance_scale=1.0, generator=[torch.Generator().manual_seed(3 + i)],
             output_type="pt").images
        for i in range(7)
    ]  # fmt: skip
    one, other = drawn(tmp_path / "run", "unaccelerated"), drawn(tmp_path / "run")
    torch.testing.assert_close(one, torch.cat(exact), atol=0.51 / 255, rtol=0)
    assert not torch.equal(one, other)
    expected = peak_signal_noise_ratio(other, one, data_range=1.0, dim=(1, 2, 3), reduction="none").mean().item()
    assert found.scores["psnr"] == pytest.approx(expected, rel=1e-5)
    assert found.scores["ssim"] == pytest.approx(
        torch.as_tensor(structural_similarity_index_measure(other, one, data_range=1.0)).item(), rel=1e-4
    )
    steps = found.details["latent_error_by_step"]
    assert len(steps) == 2
    assert 0 < steps[0] < steps[1] == found.scores["latent_error"]
    assert {"fid", "kid", "foreground_psnr"} <= set(found.scores)
    assert (found.protocol.seeds, found.protocol.steps, found.protocol.guidance) == ("3..9", 2, 1.0)
    assert found.protocol.sampler == "FlowMatchEulerDiscreteScheduler"
    assert found.protocol.options["paired"] == "unaccelerated, same seeds"
    torch.testing.assert_close(read_pictures(npz), (other * 255).round().to(torch.uint8))

    assert np.load(npz)["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"] == pytest.approx(found.scores)
    again = evaluate(other_npz(tmp_path, one), folder=tmp_path / "files", paired=npz)
    assert again.scores["psnr"] == pytest.approx(found.scores["psnr"])


def other_npz(folder: Path, images: Tensor) -> Path:
    write_pictures(folder / "exact.npz", images)
    return folder / "exact.npz"


def test_identical_pairs_count_for_no_mean(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a.npz", pictures(3))
    changed = pictures(3)
    changed[0] //= 2
    write_pictures(tmp_path / "b.npz", changed)
    found = evaluate(tmp_path / "b.npz", folder=tmp_path / "run", paired=tmp_path / "a.npz")
    assert found.details["pairs"]["identical_pairs"] == 2
    assert found.details["pairs"]["psnr"]["pairs"] == 1
    same = evaluate(tmp_path / "a.npz", folder=tmp_path / "same", paired=tmp_path / "a.npz")
    assert set(same.scores) == {"ssim"}
    assert json.loads((tmp_path / "same" / "result.json").read_text())["scores"]["ssim"] == 1


# Interrupts and several processes


def stop_after(count: int) -> Any:
    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if what == "drawing" and done == count:
                raise KeyboardInterrupt

        yield advance

    return progress


@pytest.mark.slow
def test_an_interrupted_run_goes_on(pipe: SiTPipeline, place: Path, tmp_path: Path, config: EvaluateConfig) -> None:
    def run(folder: str, **changes: Any) -> QualityResult:
        given: dict[str, Any] = dict(config=config, draw=DRAW, acceleration=FOUR, paired=True) | changes
        return evaluate(pipe, place / "reference", folder=tmp_path / folder, **given)

    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    whole = run("whole")
    total = len(calls)
    with pytest.raises(KeyboardInterrupt):
        run("cut", progress=stop_after(3))
    first = len(calls) - total
    assert first == total * 3 / 4
    resumed = run("cut")
    assert len(calls) == 2 * total
    assert resumed == whole
    assert run("cut") == whole
    assert len(calls) == 2 * total  # all of it is there
    with pytest.raises(ValueError, match=r"another protocol: acceleration: .*; draw: .*'steps': 2.*another folder"):
        run("cut", draw=DrawConfig(7, steps=3, guidance=1.0, batch=2, seed=3), acceleration={"method": "mediator"})
    with torch.no_grad():
        pipe.transformer.blocks[0].attn.qkv.weight.add_(0.1)
    with pytest.raises(ValueError, match="another protocol: weights"):
        run("cut")


@pytest.mark.slow
def test_a_patched_pipeline_is_measured_as_it_is(
    pipe: SiTPipeline, place: Path, tmp_path: Path, config: EvaluateConfig
) -> None:

    given: Any = dict(config=config, draw=DRAW)
    exact = evaluate(pipe, place / "reference", folder=tmp_path / "exact", **given)
    four = evaluate(pipe, place / "reference", folder=tmp_path / "four", acceleration=FOUR, **given)
    with diffattn.patch(pipe, **FOUR):  # type: ignore[arg-type]
        as_is = evaluate(pipe, place / "reference", folder=tmp_path / "as-is", **given)
    assert as_is.scores == pytest.approx(four.scores, rel=1e-6)
    assert exact.scores != pytest.approx(four.scores, rel=1e-6)
    assert "mediator" in as_is.subject
    assert "unaccelerated" in exact.subject
    assert compare(exact, four)["fid"] != 0


@pytest.mark.slow
def test_two_processes_come_to_the_result_of_one(pipe: SiTPipeline, place: Path, tmp_path: Path) -> None:
    words = ["-m", "diffattn", "evaluate", "--model", place / "sit", "--reference", place / "reference", "--steps", 2,
             "--num-pictures", 40, "--batch", 3, "--guidance", 1, "--extractor", "cifar-classifier", "--paired",
             "--method", "mediator", "--option", "num_mediators=4", "--device", "cpu",
             "--out", tmp_path / "two"]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> "subprocess.Popen[str]":
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
        given = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([sys.executable, *map(str, words)], env=os.environ | env, **given)  # type: ignore[call-overload]

    running = [start(rank) for rank in range(2)]
    draw = DrawConfig(num_pictures=40, steps=2, guidance=1.0, batch=3)
    config = EvaluateConfig("cifar-classifier")
    one = evaluate(
        pipe, place / "reference", folder=tmp_path / "one", config=config, draw=draw, acceleration=FOUR, paired=True
    )
    told = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    two = QualityResult.from_dict(json.loads((tmp_path / "two" / "result.json").read_text()))
    assert two.protocol == one.protocol
    changes = two.details.pop("without_group"), one.details.pop("without_group")  # type: ignore[attr-defined]
    assert two.details == one.details
    for name, found in changes[1].items():
        assert changes[0][name] == pytest.approx(found, rel=1e-3, abs=1e-6)
    assert two.scores == pytest.approx(one.scores, rel=1e-6)  # eigenvalues and sums round as threads divide them
    assert "fid" in told[0][0]
    assert told[1][0] == ""  # the main process alone prints


# Bad input


def test_bad_pictures_are_named_counted_and_left_out_on_demand(
    place: Path, tmp_path: Path, extractor: OfflineExtractor
) -> None:
    folder = save(tmp_path / "pictures", pictures(5))
    (folder / "001.png").write_bytes(b"no picture")
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"2 of 5 pictures in 'pictures' cannot be read: '001.png', '003.png'.*--skip"):
        evaluate(folder, place / "reference", folder=tmp_path / "run", config=EvaluateConfig(extractor))
    config = EvaluateConfig(extractor, skip_bad=True)
    with pytest.warns(UserWarning, match="2 of 5 pictures"):
        found = evaluate(folder, place / "reference", folder=tmp_path / "run", config=config)
    assert found.protocol.num_pictures == 3
    assert found.details["skipped"] == ["001.png", "003.png"]
    write_pictures(tmp_path / "three.npz", pictures(3))
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="they do not pair"):
        evaluate(folder, folder=tmp_path / "pairs", paired=tmp_path / "three.npz", config=config)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_the_work(
    pipe: SiTPipeline, place: Path, tmp_path: Path, config: EvaluateConfig, extractor: OfflineExtractor
) -> None:
    small = save(tmp_path / "small", pictures(4, size=8))
    one = save(tmp_path / "one", pictures(1))
    run, mine, reference = tmp_path / "run", place / "pictures", place / "reference"
    clip = EvaluateConfig(clip="no/model")
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("16x16 pixels, the reference 8x8; bring both to one size", mine, small, {}),
        ("16x16 pixels, the pairs 8x8", mine, None, {"paired": small}),
        ("as many pictures on both sides, got 9 and 12", mine, None, {"paired": reference}),
        ("draws 16x16 pixels, but the pictures to compare with have 8x8", pipe, small, {}),
        ("at least 2 pictures are needed, 'one' has 1", one, reference, {}),
        ("at least 2 pictures are needed, 'one' has 1", mine, one, {}),
        ("neither a folder nor a zip|does not exist", mine, tmp_path / "nothing", {}),
        ("nothing to measure", mine, None, {}),
        ("acceleration is for a pipeline", mine, reference, {"acceleration": FOUR}),
        ("with and without the acceleration: give one", pipe, None, {"paired": True}),
        ("unknown method: 'x'", pipe, reference, {"acceleration": {"method": "x"}}),
        ("need the prompts", mine, None, {"config": clip}),
        ("no CLIP model could be loaded from 'no/model'", mine, None,
         {"config": EvaluateConfig(clip=str(small), prompts=["a"])}),
        ("AlexNet", mine, None, {"paired": mine, "config": EvaluateConfig(lpips_weights=tmp_path / "x.pth")}),
        (r"diffattn\[inception\]", mine, reference, {"config": EvaluateConfig()}),
        ("the pictures of 'reference' have 16x16 pixels, the pairs 8x8", pipe, reference, {"paired": small}),
        ("pictures must be 2 or more, got -3", mine, reference, {"config": EvaluateConfig(extractor, limit=-3)}),
        ("pictures must be 2 or more, got 1", mine, reference, {"config": EvaluateConfig(extractor, limit=1)}),
        ("size must be 1 pixel or more", mine, reference, {"config": EvaluateConfig(extractor, side=0)}),
    ]  # fmt: skip
    for message, subject, against, more in cases:
        message = message.replace("'no/model'", repr(str(small)))
        with pytest.raises(ValueError, match=message):
            evaluate(subject, against, folder=run, **({"config": config, "draw": DRAW} | more))
    fitted = evaluate(mine, small, folder=tmp_path / "fitted", config=EvaluateConfig(extractor, side=8))
    assert fitted.protocol.options["size"] == "8x8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pictures": 1}, "must be 2 or more, got 1"), ({"steps": 0}, "steps must be 1"),
        ({"batch": 0}, "batch must be 1"), ({"seed": -1}, "seed must be"), ({"prompts": []}, "there are no prompts"),
        ({"guidance": float("nan")}, "guidance must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrawConfig(**changes)


def test_nan_pictures_are_refused_with_their_seeds(pipe: SiTPipeline, place: Path, tmp_path: Path, config: Any) -> None:
    pipe.transformer.register_forward_hook(lambda _module, _inputs, output: type(output)(output.sample * torch.nan))
    with pytest.raises(ValueError, match=r"all 7 pictures have NaN .* \(seeds 3, 4, 5"):
        evaluate(pipe, place / "reference", folder=tmp_path, config=config, draw=DRAW)


def test_a_protocol_survives_json(place: Path, tmp_path: Path, config: EvaluateConfig) -> None:
    found = evaluate(place / "pictures", place / "reference", folder=tmp_path, config=config)
    again = QualityResult.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again == found
    assert isinstance(again.protocol, Protocol)
    assert again.protocol.differences(found.protocol) == {}

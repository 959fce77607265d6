"""From two trained runs to the comparison and the exported model, as the programs in `pipelines/` do it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffattn.evaluation.sit_quality import Drawing
from diffattn.sampling import SiTPipeline
from diffattn.training.config import TrainConfig
from diffattn.training.run import train
from diffattn.training.setup import set_up

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

import compare_mediators
import export_cifar_sit

SMALL = [
    "data.size=8", "model.patch_size=2", "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2",
    "model.mediators=[1,4]", "optim.batch=4", "run.steps=2", "run.trackers=[]", "run.sample_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pictures/, softmax/, mediator/ (runs) and comparison/."""
    root = tmp_path_factory.mktemp("comparison")
    for name in ("a", "b"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / name / f"{i}.png")
    for kind in ("softmax", "mediator"):
        options = {"data.source": str(root / "pictures"), "run.out": str(root / kind)}
        config = TrainConfig.read(settings=[*SMALL, f"model.attention={kind}"], options=options)
        train(set_up(config, "cpu", lambda line: None))
    schedule = {"kind": "latent_change", "entries": [{"num_mediators": 1}, {"num_mediators": 4}], "thresholds": [1.5],
                "first": 1}  # fmt: skip
    (root / "recipe.json").write_text(json.dumps({"method": "mediator", "schedule": schedule, "protocol": {}}))
    compare(root, steps=4)
    return root


def compare(root: Path, steps: int) -> None:
    compare_mediators.main(
        recipe=root / "recipe.json", elastic=root / "mediator" / "pipeline", softmax=root / "softmax" / "pipeline",
        reference=root / "pictures",
        samples=12, steps=steps, rounds=2, batch=6, repeats=2, repeated="softmax,dynamic", out=root / "comparison",
    )  # fmt: skip


def test_every_variant_is_scored_counted_and_timed(place: Path) -> None:
    found = json.loads((place / "comparison" / "comparison.json").read_text())["variants"]
    assert list(found)[:5] == ["softmax", "n = 1", "n = 4", "dynamic", "tuned"]
    for name in ("dynamic", "tuned"):
        assert found["n = 1"]["gflops"] < found[name]["gflops"] < found["n = 4"]["gflops"]
    assert all({"fid", "kid"} <= set(v["scores"]) and v["time_ratio"]["median"] > 0 for v in found.values())
    assert {name for name, v in found.items() if len(v["repeats"]) == 2} == {"softmax", "dynamic"}
    assert all(v["repeats"][0] == v["scores"] not in v["repeats"][1:] for v in found.values())
    text = (place / "comparison" / "comparison.md").read_text()
    assert "| softmax | 2 |" in text
    assert "| n = 1 | 1 |" in text
    assert "| dynamic |" in text
    assert (place / "comparison" / "switches.png").stat().st_size > 1000


def test_only_the_named_variants_are_compared_and_results_of_earlier_versions_are_read(place: Path) -> None:
    place = place / "earlier"
    place.mkdir()
    results = json.loads((place.parent / "comparison" / "comparison.json").read_text())
    for name, result in results["variants"].items():
        del result["repeats"]
        if name != "n = 1":
            result["weights"] = "of another training"
    (place / "comparison.json").write_text(json.dumps(results))
    compare_mediators.main(
        elastic=place.parent / "mediator" / "pipeline", reference=place.parent / "pictures", samples=12, steps=4,
        rounds=2, batch=6, only="n = 1", out=place,
    )  # fmt: skip
    (line,) = (place / "comparison.md").read_text().splitlines()[2:]
    assert line.startswith("| n = 1 |")
    assert not (place / "switches.png").exists()


def test_times_alone_at_several_sizes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_mediators.main(
        elastic=place / "mediator" / "pipeline", softmax=place / "softmax" / "pipeline", samples=2, steps=2, rounds=2,
        batch=2, sizes="8,16", only="softmax,dynamic", out=tmp_path,
    )  # fmt: skip
    ratios = json.loads((tmp_path / "times.json").read_text())["time_ratios"]
    assert {size: list(found) for size, found in ratios.items()} == {
        "8": ["softmax", "dynamic"],
        "16": ["softmax", "dynamic"],
    }
    assert "| 8×8 (16 tokens) | 16×16 (64 tokens) |" in capsys.readouterr().out
    assert not (tmp_path / "comparison.json").exists()


def test_a_recipe_without_mediators_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "agents.json").write_text('{"method": "agent", "preset": "fast"}')
    with pytest.raises(ValueError, match="has no schedule of mediators; make one with diffattn tune --budget"):
        compare_mediators.variants(None, place / "mediator" / "pipeline", tmp_path / "agents.json")


def drawn(pipe: SiTPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 1], num_inference_steps=4, generator=generator, output_type="latent").images  # type: ignore[attr-defined]


def test_cached_blocks_save_work_and_leave_nothing_behind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    softmax, elastic = (place / name / "pipeline" for name in ("softmax", "mediator"))
    found = compare_mediators.variants(softmax, elastic)
    cached = [v for v in found if v.cached]
    if why := compare_mediators.why_no_caching():
        assert not cached
        assert f"cached blocks are left out: {why}" in capsys.readouterr().out
        return
    assert [v.name for v in cached] == [f"{name}, cached {k}" for name in ("softmax", "n = 4") for k in (2, 3)]
    drawing, generator = Drawing(2, 6, 1.0, 0, 2), torch.Generator().manual_seed(0)
    with torch.no_grad():  # two steps of training leave the gates of blocks at almost 0: no block would do anything
        for parameter in dict.fromkeys(p for variant in cached for p in variant.pipe.transformer.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for variant in cached:
        exact = drawn(variant.pipe)
        with variant.applied():
            first, again = drawn(variant.pipe), drawn(variant.pipe)
        torch.testing.assert_close(first, again, atol=0, rtol=0)  # a run begins with nothing of the one before
        assert not torch.equal(first, exact)
        assert torch.equal(drawn(variant.pipe), exact)
        assert type(variant.pipe) is SiTPipeline
    whole, *less = (next(v for v in found if v.name == name).gflops(drawing)
                    for name in ("softmax", "softmax, cached 2", "softmax, cached 3"))  # fmt: skip
    assert whole > less[0] > less[1] > 0.5 * whole  # two blocks, of which the first always runs
    results = json.loads((place / "comparison" / "comparison.json").read_text())["variants"]
    assert {v.name for v in cached} <= set(results)


def test_results_of_another_protocol_are_not_mixed_in(place: Path) -> None:
    file = place / "comparison" / "comparison.json"
    before = file.read_text()
    results = json.loads(before)
    del results["variants"]["dynamic"]
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"'steps': 4.*now.*'steps': 5"):
        compare(place, steps=5)
    assert json.loads(file.read_text()) == results  # nothing was written
    file.write_text(before)


def test_results_of_other_weights_are_not_mixed_in(place: Path) -> None:
    file = place / "comparison" / "comparison.json"
    before = file.read_text()
    results = json.loads(before)
    results["variants"]["dynamic"]["weights"] = "of another training"
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"has 'dynamic' of \{'weights': 'of another training'"):
        compare(place, steps=4)
    file.write_text(before)


def test_the_exported_model_is_small_loads_and_has_a_card(place: Path, tmp_path: Path) -> None:
    comparison = place / "comparison" / "comparison.json"
    export_cifar_sit.main(run=place / "mediator", comparison=comparison, command=["train", "compare"], out=tmp_path)
    pipe = SiTPipeline.from_pretrained(tmp_path)
    assert pipe.transformer.mediators == (1, 4)
    assert "_name_or_path" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    card = (tmp_path / "README.md").read_text()
    assert "has 1 or 4 mediators" in card
    assert "| n = 4 |" in card
    assert "{" not in card.split("## Recipe")[1]

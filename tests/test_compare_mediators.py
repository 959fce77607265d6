"""From two trained runs to the comparison and the exported model, as the programs in `pipelines/` do it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffattn.sampling import SiTPipeline
from diffattn.training.config import TrainConfig
from diffattn.training.run import train
from diffattn.training.setup import set_up

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

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
        train(set_up(TrainConfig.read(settings=[*SMALL, f"model.attention={kind}"], options=options), "cpu", str))
    compare(root, steps=3)
    return root


def compare(root: Path, steps: int) -> None:
    compare_mediators.main(
        elastic=root / "mediator" / "pipeline", softmax=root / "softmax" / "pipeline", reference=root / "pictures",
        samples=12, steps=steps, rounds=2, batch=6, out=root / "comparison",
    )  # fmt: skip


def test_every_variant_is_scored_counted_and_timed(place: Path) -> None:
    found = json.loads((place / "comparison" / "comparison.json").read_text())["variants"]
    assert list(found) == ["softmax", "n = 1", "n = 4", "dynamic"]
    assert found["n = 1"]["gflops"] < found["dynamic"]["gflops"] < found["n = 4"]["gflops"]
    assert all({"fid", "kid"} <= set(v["scores"]) and v["time_ratio"]["median"] > 0 for v in found.values())
    assert "| dynamic |" in (place / "comparison" / "comparison.md").read_text()


def test_results_of_another_protocol_are_not_mixed_in(place: Path) -> None:
    file = place / "comparison" / "comparison.json"
    before = file.read_text()
    results = json.loads(before)
    del results["variants"]["dynamic"]
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="steps: 3 and 4"):
        compare(place, steps=4)
    file.write_text(before)


def test_the_exported_model_is_small_loads_and_has_a_card(place: Path, tmp_path: Path) -> None:
    comparison = place / "comparison" / "comparison.json"
    export_cifar_sit.main(run=place / "mediator", comparison=comparison, command=["train", "compare"], out=tmp_path)
    pipe = SiTPipeline.from_pretrained(tmp_path)
    assert pipe.transformer.mediators == (1, 4)
    card = (tmp_path / "README.md").read_text()
    assert "has 1 or 4 mediators" in card
    assert "| n = 4 |" in card
    assert "{" not in card.split("## Recipe")[1]

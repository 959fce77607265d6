"""The assets of the package are complete, and do not reveal the folders in which they were made."""

from importlib.resources import files
from pathlib import Path

import pytest

from diffattn.app.jobs import Models, Worker
from diffattn.app.jobs.quality_run import REFERENCE_FILE
from diffattn.metrics.reference import Reference

ASSETS = Path(str(files("diffattn") / "assets"))
FILES = sorted(ASSETS.rglob("*.json"))


def test_the_embedded_models_have_configurations() -> None:
    assert {path.relative_to(ASSETS).parts[0] for path in FILES} >= {
        "cifar-sit",
        "emoji-sd",
        "emoji-mmdit",
        "emoji-sit",
        "cifar-classifier",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_no_configuration_tells_where_it_was_trained(path: Path) -> None:
    assert "_name_or_path" not in path.read_text()


def test_the_page_has_runs_and_a_reference_of_every_embedded_model_at_start() -> None:
    worker = Worker(Models(hub=False), device="cpu")
    names = ["emoji-sd", "emoji-mmdit", "emoji-sit", "cifar-sit"]
    assert [run.model for run in worker.stored_runs()] == worker.models.names() == names
    for run in worker.stored_runs():
        assert run.lines[0].acceleration == "none"
        assert len(run.lines) > 4
        reference = Reference.load(ASSETS / run.model / REFERENCE_FILE)
        assert reference.name == run.lines[0].quality.protocol.reference

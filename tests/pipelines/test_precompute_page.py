"""`pipelines/precompute_page.py` on few pictures and steps."""

import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffattn.app.jobs.quality_run import REFERENCE_FILE, RUNS_FILE, read_runs
from diffattn.metrics.reference import Reference

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

import precompute_page


def test_reference_and_runs_of_a_model_are_written_and_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        noise = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(noise.numpy()).save(pictures / f"{i:02}.png")
    settings: dict[str, Any] = dict(samples=8, steps=1, numbers="", ways="mediator/fast", threads=1, out=out)
    precompute_page.main("cifar-sit", pictures=pictures, every=2, **settings)
    assert f"{out / RUNS_FILE}" in capsys.readouterr().out
    assert Reference.load(out / REFERENCE_FILE).statistics.count == 10
    (run,) = read_runs(out / RUNS_FILE)
    assert [line.acceleration for line in run.lines] == ["none", "mediator/fast"]
    assert run.lines[0].quality.protocol.reference == "pictures, 10 pictures"

    shutil.rmtree(pictures)
    precompute_page.main("cifar-sit", seed=5, **settings)
    again = read_runs(out / RUNS_FILE)[0].lines[0].quality.protocol
    assert (again.reference, again.seeds) == ("pictures, 10 pictures", "5..12")


def test_captions_of_a_zip_become_the_prompts(tmp_path: Path) -> None:
    rows = []
    with zipfile.ZipFile(tmp_path / "emoji.zip", "w") as archive:
        for i in range(20):
            Image.new("RGB", (64, 64), (12 * i, 99, 255 - 12 * i)).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"{i}.png")
            rows.append(f'{{"file_name": "{i}.png", "text": "emoji {i}"}}')
        archive.writestr("metadata.jsonl", "\n".join(rows))
    out = tmp_path / "out"
    precompute_page.main(
        "emoji-sd", pictures=tmp_path / "emoji.zip", every=2, samples=8, steps=1, numbers="", ways="agent/fast",
        threads=1, out=out,
    )  # fmt: skip
    assert read_runs(out / RUNS_FILE)[0].prompts == tuple(f"emoji {i}" for i in range(0, 20, 2))
    assert Reference.load(out / REFERENCE_FILE).statistics.count == 10

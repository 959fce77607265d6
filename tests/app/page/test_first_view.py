"""What a visitor sees before the first click."""

# ruff: noqa: E402, the page needs Gradio

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import web

web.need_gradio()

from diffattn.app.jobs.first_view import FirstView, write_first_view
from diffattn.app.jobs.speed_up import SpeedUp
from diffattn.app.page.first_view import shown

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> FirstView:
    folder = tmp_path_factory.mktemp("first_view")
    worker = web.tiny_worker(web.save_models(folder / "models", side=64))
    asked = web.ask(worker, prompt="<b>a cat", num_images=3)
    found: Any = list(worker.compare("a", asked, ["agent/fast"]))[-1]
    stored = write_first_view(found, found.variants[1], worker.device, folder)
    assert FirstView.read(folder) == stored
    return replace(stored, speedup=SpeedUp(1.8, 1.7, 1.9, 3))


@pytest.mark.slow
def test_the_pair_has_its_figures_and_says_what_it_is(view: FirstView) -> None:
    html = shown(view, "Fast", (64, 64))
    assert "1.80× faster" in html
    assert f"PSNR {view.psnr:.1f} dB" in html
    assert view.machine in html
    assert "64×64 pixels" in html
    assert "Small picture, small gain" in html
    assert "<b>" not in html
    assert html.count("alt=") == 2


def test_likeness_is_told_at_the_size_that_the_model_was_trained_at(view: FirstView) -> None:
    assert "PSNR" not in shown(view, "Fast", (128, 128))
    assert "PSNR" in shown(view, "Fast", None)


def test_a_damaged_view_is_refused_in_words(view: FirstView, tmp_path: Path) -> None:
    for text in ("[]", "{}", '{"size": 3}'):
        (tmp_path / "first_view.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not a first view|does not contain a JSON object") as refused:
            FirstView.read(tmp_path)
        assert str(tmp_path.parent) not in str(refused.value)

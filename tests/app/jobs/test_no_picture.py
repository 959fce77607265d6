"""Jobs without usable pictures: NaN stops them with one sentence, blanked pictures are counted and not scored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import faulty, tiny, web

from diffattn.app.jobs import Comparison, Drawn, NotFinite, QualityRun, Worker

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """nan: a model of NaN weights; strict: one whose safety checker blanks the exact picture of "a cat", seed 2."""
    place = tmp_path_factory.mktemp("no_picture")
    web.save_models(place / "models", side=64)
    pipe: Any = tiny.pipeline("sd", place / "tokenizer")
    pipe.unet.register_to_config(sample_size=64 // pipe.vae_scale_factor)
    drawn = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(2)).images[0]
    faulty.add_checker(pipe, blanks=drawn)
    pipe.save_pretrained(place / "models" / "strict")
    faulty.add_checker(pipe, everything=True)
    pipe.save_pretrained(place / "models" / "prude")
    faulty.spoil_unet(pipe, torch.nan)
    pipe.register_modules(safety_checker=None)
    pipe.save_pretrained(place / "models" / "nan")
    return web.tiny_worker(place / "models")


def measurement(worker: Worker, model: str) -> Any:
    return worker.limits.measurement(
        [model], accelerations=["agent/fast"], samples=8, steps=2, prompts="a cat", extractor="emoji-classifier"
    )


JOBS = {
    "generate": lambda worker, model: worker.generate("a", web.ask(worker, model=model)),
    "compare": lambda worker, model: worker.compare("a", web.ask(worker, model=model), ["agent/fast"]),
    "measure": lambda worker, model: worker.measure("a", measurement(worker, model)),
}


@pytest.mark.parametrize("job", JOBS)
def test_nan_stops_a_job_with_one_sentence(worker: Worker, job: str) -> None:
    events = []
    with pytest.raises(NotFinite, match=r"NaN or infinite values instead of a picture \(seed 0, Stable"):
        events.extend(JOBS[job](worker, "nan"))
    assert not [event for event in events if isinstance(event, Drawn | Comparison | QualityRun)]
    assert not web.loaded(worker).vae.decoder._forward_hooks


def test_the_page_shows_that_sentence(tmp_path: Path) -> None:
    web.need_gradio()
    from diffattn.app.page.shared import toast

    half = tiny.pipeline("sd", tmp_path).to(torch.float16)
    error = toast(NotFinite(half, 3))
    assert error.title == "The model failed"
    assert "(seed 3, StableDiffusionPipeline in float16): try float32 or bfloat16" in str(error.message)


def test_blanked_pictures_are_counted(worker: Worker) -> None:
    drawn: Any = [*worker.generate("a", web.ask(worker, model="strict", seed=1, num_images=3))][-1]
    assert [picture.blanked for picture in drawn.pictures] == [False, True, False]
    found: Any = [*worker.compare("a", web.ask(worker, model="strict", seed=2), ["agent/fast"])][-1]
    assert found.variants[0].blanked == 1
    assert (found.variants[1].psnr, found.variants[1].ssim) == (None, None)  # a black picture compares with nothing


def test_blanked_pictures_are_not_measured(worker: Worker) -> None:
    [run] = [event for event in worker.measure("a", measurement(worker, "strict")) if isinstance(event, QualityRun)]
    exact = run.lines[0].quality
    assert exact.protocol.num_pictures == 7
    assert exact.details == {"blanked": 1}
    with pytest.raises(ValueError, match=r"safety checker blanked 8 of 8 pictures of the reference: at least 4 others"):
        list(worker.measure("a", measurement(worker, "prude")))

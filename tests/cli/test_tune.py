"""`diffattn tune` and `diffattn generate --recipe`, and a promise that holds on prompts it was not tuned on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.commands import call

import diffattn
from diffattn.drawing.draw import prepare
from diffattn.drawing.request import record_of, request_of
from diffattn.tuning.runs import relative_error

QUICK = ("--steps", 3, "--bands", 1, "--cost", "flops", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny.pipeline("sd", place / "tokenizer").save_pretrained(place / "sd")
    return place / "sd"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n")
    return file


def test_tune_writes_a_recipe_that_generate_reads(model: Path, prompts: Path, tmp_path: Path) -> None:
    recipe, results, picture = tmp_path / "recipe.json", tmp_path / "all.json", tmp_path / "a.png"
    words = ("tune", "--model", model, "--prompts", prompts, *QUICK, "--presets", "--out", recipe, "--json", results)
    done = call(*words, "--max-error", 0.05)
    assert done.exit_code == 0, done.output
    assert "denoiser calls" in done.stderr
    assert "preset agent/paper: " in done.stdout
    found = json.loads(results.read_text())
    assert found["recipe"] == json.loads(recipe.read_text())
    promised, verified = found["recipe"]["promised"]["error"], found["recipe"]["verified"]
    assert verified["error"] < promised == verified["two_standard_errors_above"] <= 0.05
    assert f"promised: error {promised:.4f}; " in done.stdout
    assert found["recipe"]["protocol"]["prompts"] == 2
    assert any(check["rungs"] for check in found["checks"])
    rivals = {f"{m.name}/{preset}" for m in diffattn.METHODS.values() if m.candidates() for preset in m.presets}
    assert {r["preset"] for r in found["rivals"]} == rivals

    words = ("generate", "--model", model, "--prompt", "a cat", "--steps", 3, "--device", "cpu", "--dtype", "float32")
    drawn = call(*words, "--recipe", recipe, "--out", picture)
    assert drawn.exit_code == 0, drawn.output
    methods = "+".join(sorted({setting["method"] for setting in found["recipe"]["settings"].values()}))
    assert f"UNet2DConditionModel: {methods}" in drawn.stdout
    stored = record_of(picture)
    assert stored["recipe"] == found["recipe"]
    pipe = diffattn.drawing.loading.load_pipeline(str(model))  # type: ignore[attr-defined]
    request, patch = prepare(pipe, request_of(stored))
    assert request.method == methods
    assert patch is not None
    assert patch.report().layers_patched > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-error", 0.1), "tuning needs --prompts"),
        (("--prompts", "no-such-file", "--max-error", 0.1), "prompts file 'no-such-file' cannot be read"),
        (("--prompts", "EMPTY", "--max-error", 0.1), "has no prompts"),
        (("--prompts", "GIVEN"), "give either a largest error"),
        (("--prompts", "GIVEN", "--max-error", 0.1, "--min-speedup", 1.1), "give either a largest error"),
        (("--prompts", "GIVEN", "--max-error", 2), "max_error must be above 0 and at most 1, got 2"),
        (("--prompts", "GIVEN", "--max-error", 0.1, "--budget", 0.5), "is not tuned with --budget"),
        (("--prompts", "GIVEN", "--max-error", 0.1, "--steps", 1001), "1001 cannot be larger than"),
        (("--prompts", "GIVEN", "--max-error", 0.1, "--seed", -1), "seed must be at least 0 and below 2^63, got -1"),
        (("--prompts", "GIVEN", "--min-speedup", 50), "a speed-up of 50 cannot be reached"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)
def test_bad_input_is_one_line(
    model: Path, prompts: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    places = {"GIVEN": prompts, "EMPTY": tmp_path / "empty.txt"}
    given = [places.get(str(word), word) for word in words]
    done = call("tune", "--model", model, *QUICK, *given, "--out", tmp_path / "recipe.json")
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize(
    ("text", "beside", "message"),
    [
        ("{", (), "is not a readable JSON file"),
        ('{"diffattn_recipe": 7}', (), "recipe has version 7"),
        ('{"method": "agent", "preset": "fast"}', ("--method", "mediator"), "for method 'agent', not 'mediator'"),
        (
            '{"method": "agent", "preset": "fast"}',
            ("--method", "none"),
            "method 'none' has no preset, no options and no",
        ),
    ],
)
def test_generate_refuses_bad_recipes(
    model: Path, tmp_path: Path, text: str, beside: tuple[str, ...], message: str
) -> None:
    (tmp_path / "recipe.json").write_text(text)
    words = ("generate", "--model", model, "--prompt", "a cat", "--recipe", tmp_path / "recipe.json", "--device", "cpu")
    done = call(*words, *beside, "--out", tmp_path / "a.png")
    assert done.exit_code == 2
    assert message in done.stderr


CALIBRATION = ["crab", "red apple", "snail", "key"]
HELD_OUT = ["mushroom", "hot dog", "sailboat", "crown", "bell"]
LANDMARKS = [
    (
        "agent",
        {"agents": "landmarks", "max_head_error": 0.5, "num_agents": None, "agent_ratio": 1 - share, "min_tokens": 0},
    )
    for share in (1 / 8, 1 / 32)
]


def test_on_emoji_the_promise_holds_for_other_prompts_and_seeds() -> None:
    pipe: Any = diffattn.load_demo("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    steps, guidance, budget, side = 4, 2.5, 0.08, 256
    tuned = diffattn.tune(
        pipe, CALIBRATION, max_error=budget, candidates=LANDMARKS, steps=steps, guidance=guidance, bands=2, probed=1,
        cost="flops", checks=4, width=side, height=side,
    )  # fmt: skip

    def latents(prompt: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(
            prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="latent",
            width=side, height=side,
        ).images  # fmt: skip

    exact = [latents(prompt, 100 + i) for i, prompt in enumerate(HELD_OUT)]
    with diffattn.patch(pipe, recipe=tuned.recipe):
        errors = [relative_error(latents(p, 100 + i), exact[i]) for i, p in enumerate(HELD_OUT)]
    assert budget / 10 < sum(errors) / len(errors) <= tuned.recipe["promised"]["error"] <= budget
    assert tuned.speedup > 1.02

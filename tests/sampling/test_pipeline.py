"""The pipeline: against the fixtures, and end to end on tiny models."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from PIL import Image
from support.sampling_cases import NAMES, official, sampling_case, tiny_pipeline
from support.tiny_dit import tiny_dit
from torch import Tensor, nn

import diffattn
from diffattn.models import DiT
from diffattn.sampling import EulerMaruyamaScheduler, SiTPipeline

SCHEDULERS = {
    "euler": (FlowMatchEulerDiscreteScheduler, lambda n: n),
    "heun": (FlowMatchHeunDiscreteScheduler, lambda n: 2 * n - 1),
    "sde": (EulerMaruyamaScheduler, lambda n: n),
}
every_scheduler = pytest.mark.parametrize("kind", SCHEDULERS)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images(pipe: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Tensor:
    """Four steps, as a tensor [B, c, H, W] in [0, 1]."""
    options = dict(num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(seed)) | kwargs
    found = pipe(*args, **options).images
    assert isinstance(found, Tensor)
    return found


def tiny_vae() -> AutoencoderKL:
    """Pixels are twice as many along each side, and latents neither centred nor of unit size."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
        block_out_channels=(8, 8),  # type: ignore[arg-type]
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()


def official_pipeline(name: str, scheduler: Any) -> tuple[Any, Any]:
    case = sampling_case(name)
    pipe = SiTPipeline(official(case), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe, case


# Against the fixtures.


def test_euler_follows_the_reference() -> None:
    pipe, case = official_pipeline("sit_ode_linear", FlowMatchEulerDiscreteScheduler())
    trajectory = [case["in.z"]]

    def keep(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        trajectory.append(tensors["latents"])

    arguments: dict[str, Any] = dict(latents=case["in.z"], num_inference_steps=9, output_type="latent")
    found = pipe(case["in.y"], callback_on_step_end=keep, **arguments).images
    case.assert_close(found, "out.euler10.final")
    case.assert_close(torch.stack(trajectory), "out.euler10.traj")


def test_heun_follows_the_reference_up_to_its_last_step() -> None:
    """The reference's last step is Heun's too; diffusers' is Euler's, so here it is taken by hand."""
    pipe, case = official_pipeline("sit_ode_linear", FlowMatchHeunDiscreteScheduler())
    states = []

    def keep(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        states.append(tensors["latents"])

    def v(x: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            return pipe.transformer(x, torch.tensor([t]), case["in.y"]).sample

    pipe(case["in.y"], 9, latents=case["in.z"], output_type="latent", callback_on_step_end=keep)
    assert len(states) == 17
    x, t = states[15], 8 / 9
    slope = v(x, t)
    case.assert_close(x + (slope + v(x + slope / 9, 1.0)) / 18, "out.heun2_10.final")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sit_ode_linear", "sit_ode_linear_cfg"])
@pytest.mark.parametrize(
    ("scheduler", "order"), [(FlowMatchEulerDiscreteScheduler, 1), (FlowMatchHeunDiscreteScheduler, 2)]
)
def test_more_steps_converge_to_the_reference_with_the_order_of_the_method(
    name: str, scheduler: Any, order: int
) -> None:
    """Twice the steps make the error 2 or 4 times smaller, and without its leading term it is nearly none."""
    pipe, case = official_pipeline(name, scheduler())
    scale = case.params["cfg_scale"]
    guidance = dict(guidance_scale=scale, guidance_channels=3) if scale else {}
    exact = case["out.converged_f64.final"][:1]
    coarse, fine = (
        pipe(case["in.y"][:1], n, latents=case["in.z"][:1], output_type="latent", **guidance).images for n in (40, 80)
    )
    errors = (coarse - exact).norm(), (fine - exact).norm()
    assert (errors[0] / errors[1]).item() == pytest.approx(2**order, rel=0.1)
    extrapolated = fine + (fine - coarse) / (2**order - 1)
    if order == 2:
        torch.testing.assert_close(extrapolated, exact, **case.tolerance)
    else:
        assert (extrapolated - exact).norm() < 0.1 * errors[1]


def test_guidance_of_the_first_channels_equals_the_reference() -> None:
    pipe, case = official_pipeline("sit_ode_linear_cfg", FlowMatchEulerDiscreteScheduler())
    x, y = case["in.z"], case["in.y"]
    scale = case.params["cfg_scale"]
    arguments: dict[str, Any] = dict(guidance_scale=scale, latents=x[:1], num_inference_steps=9, output_type="latent")
    found = pipe(y[:1], guidance_channels=3, **arguments).images
    torch.testing.assert_close(found, case["out.euler10.final"][:1], **case.tolerance)
    everywhere = pipe(y[:1], **arguments).images
    assert (everywhere - found).abs().max() > 1e-2
    assert everywhere.equal(pipe(y[:1], guidance_channels=4, **arguments).images)


def test_the_sde_follows_the_reference() -> None:
    pipe, case = official_pipeline("sit_sde_linear", EulerMaruyamaScheduler(last_step="tweedie"))
    generator = torch.Generator().manual_seed(case.params["torch_seed"])
    found = pipe(case["in.y"], 10, latents=case["in.z"], generator=generator, output_type="latent").images
    case.assert_close(found, "out.sigma.Tweedie.final")


# What the transformer is given.


class Recorder:
    """Keeps the inputs of every call of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        module.register_forward_pre_hook(lambda module, args: self.calls.append(args))


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("euler", [0, 0.25, 0.5, 0.75]),
        ("heun", [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]),
        ("sde", [0, 0.32, 0.64, 0.96]),
    ],
)
def test_the_grid_is_uniform_and_time_runs_to_the_data(kind: str, times: list[float]) -> None:
    pipe = tiny_pipeline(SCHEDULERS[kind][0]())
    record = Recorder(pipe.transformer)
    images(pipe, [0, 1])
    assert [t.tolist() for _, t, _ in record.calls] == [pytest.approx([t] * 2, abs=1e-6) for t in times]
    assert pipe.num_timesteps == len(times)


def test_heun_leaves_its_scheduler_as_it_was() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    images(tiny_pipeline(scheduler), 0)
    fresh = FlowMatchHeunDiscreteScheduler()
    assert (scheduler.sigma_min, scheduler.sigma_max) == (fresh.sigma_min, fresh.sigma_max)
    assert scheduler.config == fresh.config


def test_a_shift_bends_the_grid() -> None:
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchHeunDiscreteScheduler(shift=3.0)):
        pipe = tiny_pipeline(scheduler)
        record = Recorder(pipe.transformer)
        images(pipe, 0, num_inference_steps=2)
        assert record.calls[1][1].item() == pytest.approx(1 - 3 * 0.5 / (1 + 2 * 0.5), abs=1e-6)


def test_guidance_is_one_batch_without_class_first() -> None:
    pipe = tiny_pipeline()
    record = Recorder(pipe.transformer)
    images(pipe, [1, 3], guidance_scale=2.0, num_inference_steps=1)
    ((x, t, y),) = record.calls
    assert y.tolist() == [5, 5, 1, 3]
    assert x[:2].equal(x[2:])
    assert t.shape == (4,)


def test_guidance_of_0_is_without_class_and_of_1_is_none() -> None:
    pipe = tiny_pipeline()
    assert images(pipe, 1, guidance_scale=0.0).equal(images(pipe, 3, guidance_scale=0.0))
    record = Recorder(pipe.transformer)
    images(pipe, 1)
    assert all(len(x) == 1 for x, _, _ in record.calls)
    assert not pipe.do_classifier_free_guidance


def test_a_callback_can_end_the_guidance() -> None:
    pipe = tiny_pipeline()
    record = Recorder(pipe.transformer)

    def end(pipe: SiTPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 1.0
        return {}

    images(pipe, 1, guidance_scale=3.0, callback_on_step_end=end)
    assert [len(x) for x, _, _ in record.calls] == [2, 1, 1, 1]


@pytest.mark.slow
@every_scheduler
def test_a_run_never_waits_for_the_device(kind: str) -> None:
    """Tensors on "meta" have no values: whatever asked for one would raise."""
    pipe = tiny_pipeline(SCHEDULERS[kind][0]())
    pipe.transformer.to("meta")
    found = images(pipe, [0, 1], generator=None, guidance_scale=2.0, output_type="latent")
    assert found.device.type == "meta"
    assert found.shape == (2, 4, 16, 16)


@pytest.mark.slow
@every_scheduler
def test_nor_does_a_run_that_follows_the_noise_level(kind: str) -> None:
    pipe = tiny_pipeline(SCHEDULERS[kind][0]())
    pipe.transformer.to("meta")
    least, most = min(pipe.transformer.mediators), max(pipe.transformer.mediators)
    with diffattn.patch(pipe, "mediator", schedule={0.5: {"num_mediators": least}, 0.0: {"num_mediators": most}}):
        found = pipe([0, 1], num_inference_steps=4, output_type="latent", return_trace=True)
    assert found.images.device.type == "meta"
    assert [call["phase"] for call in found.trace] == sorted(call["phase"] for call in found.trace)
    assert {call["phase"] for call in found.trace} == {0, 1}


# Images.


@every_scheduler
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_runs_are_repeatable_and_depend_on_seed_and_class(kind: str, guidance: float) -> None:
    pipe = tiny_pipeline(SCHEDULERS[kind][0]())
    first = images(pipe, [0, 1], guidance_scale=guidance)
    assert first.shape == (2, 4, 16, 16)
    assert first.isfinite().all()
    assert 0 <= first.min() < first.max() <= 1
    assert first.equal(images(pipe, [0, 1], guidance_scale=guidance))
    assert not first.equal(images(pipe, [0, 1], guidance_scale=guidance, seed=1))
    assert not first.equal(images(pipe, [2, 1], guidance_scale=guidance))


@every_scheduler
def test_a_generator_per_image_makes_images_independent(kind: str) -> None:
    pipe = tiny_pipeline(SCHEDULERS[kind][0]())
    together = images(pipe, [0, 3, 1], generator=seeded(5, 6, 7))
    for i, (label, seed) in enumerate([(0, 5), (3, 6), (1, 7)]):
        torch.testing.assert_close(together[i : i + 1], images(pipe, label, seed=seed), atol=1e-5, rtol=1e-4)


def test_several_images_per_label() -> None:
    pipe = tiny_pipeline()
    found = images(pipe, ["dog", 0], num_images_per_label=2, generator=seeded(0, 1, 2, 3))
    torch.testing.assert_close(found, images(pipe, [1, 1, 0, 0], generator=seeded(0, 1, 2, 3)))


def test_names_and_ids_draw_the_same() -> None:
    pipe = tiny_pipeline()
    assert pipe.get_label_ids("tabby") == [0]
    assert pipe.labels["fish"] == 4
    assert images(pipe, ["fish", "dog"]).equal(images(pipe, torch.tensor([4, 1])))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_space(channels: int) -> None:
    pipe = tiny_pipeline(in_channels=channels)
    as_tensor = images(pipe, [0, 1])
    as_array = pipe([0, 1], 4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert as_array.shape == (2, 16, 16, channels)
    np.testing.assert_array_equal(as_array, as_tensor.permute(0, 2, 3, 1).numpy())
    pictures = pipe([0, 1], 4, generator=torch.Generator().manual_seed(0)).images
    assert [(p.size, p.mode) for p in pictures] == [((16, 16), "L" if channels == 1 else "RGB")] * 2
    raw = pipe([0, 1], 4, generator=torch.Generator().manual_seed(0), output_type="latent").images
    torch.testing.assert_close((raw / 2 + 0.5).clamp(0, 1), as_tensor)


def test_a_vae_decodes_what_the_transformer_draws() -> None:
    pipe = tiny_pipeline(vae=tiny_vae())
    assert pipe.vae_scale_factor == 2
    latents = images(pipe, [0, 1], output_type="latent")
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.5 + 0.25).sample
    found = images(pipe, [0, 1])
    assert found.shape == (2, 3, 32, 32)
    torch.testing.assert_close(found, (decoded / 2 + 0.5).clamp(0, 1))
    (picture,) = pipe(0, 2).images
    assert isinstance(picture, Image.Image)
    assert picture.size == (32, 32)


@pytest.mark.parametrize(("with_vae", "height", "width"), [(False, 20, 12), (True, 24, 40), (True, None, 24)])
def test_other_sizes(with_vae: bool, height: int | None, width: int | None) -> None:
    pipe = tiny_pipeline(vae=tiny_vae() if with_vae else None, attention="softmax")
    found = images(pipe, 0, height=height, width=width)
    assert found.shape[-2:] == (height or 32, width)


def test_latents_bring_their_size() -> None:
    pipe = tiny_pipeline(attention="softmax")
    start = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    found = images(pipe, 0, latents=start, output_type="latent")
    assert found.shape == start.shape
    assert found.equal(images(pipe, 0, latents=start, output_type="latent", seed=1))
    assert start.equal(torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3)))


@every_scheduler
def test_the_state_is_single_precision_under_a_half_precision_model(kind: str) -> None:
    pipe = tiny_pipeline(SCHEDULERS[kind][0](), vae=tiny_vae())
    exact = images(pipe, 1, output_type="latent", guidance_scale=2.0)
    pipe.to(torch.bfloat16)
    record, dtypes = Recorder(pipe.transformer), set()

    def look(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        dtypes.add(tensors["latents"].dtype)

    rounded = images(pipe, 1, output_type="latent", guidance_scale=2.0, callback_on_step_end=look)
    assert dtypes == {torch.float32}
    assert {x.dtype for x, _, _ in record.calls} == {torch.bfloat16}
    assert {t.dtype for _, t, _ in record.calls} == {torch.float32}
    assert (rounded - exact).norm() < 0.1 * exact.norm()
    assert images(pipe, 1).dtype == torch.float32


@pytest.mark.parametrize("return_trace", [False, True])
def test_tuple_instead_of_output(return_trace: bool) -> None:
    pipe = tiny_pipeline()
    found = pipe(0, 2, output_type="pt", return_dict=False, return_trace=return_trace)
    assert isinstance(found, tuple)
    assert len(found) == 1 + return_trace


# Steps under way.


@every_scheduler
def test_callback_sees_and_changes_every_step(kind: str) -> None:
    scheduler, evaluations = SCHEDULERS[kind]
    pipe = tiny_pipeline(scheduler())
    seen: list[tuple[int, float]] = []

    def double(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, timestep.item()))
        return {"latents": tensors["latents"] * 0} if step == evaluations(4) - 1 else {}

    found = images(pipe, 0, output_type="latent", callback_on_step_end=double)
    assert found.equal(torch.zeros_like(found))
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert len(seen) == evaluations(4)


def test_a_callback_may_ask_for_nothing() -> None:
    given = []
    pipe = tiny_pipeline()
    images(
        pipe,
        0,
        callback_on_step_end=lambda pipe, step, timestep, tensors: given.append(tensors),
        callback_on_step_end_tensor_inputs=[],
    )
    assert given == [{}] * 4


@every_scheduler
def test_interrupt_ends_the_run_before_its_next_step_and_leaves_nothing_behind(kind: str) -> None:
    pipe = tiny_pipeline(SCHEDULERS[kind][0]())
    before, record, states = images(pipe, 0), Recorder(pipe.transformer), []

    def stop(pipe: SiTPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        states.append(tensors["latents"])
        pipe._interrupt = step == 1

    found = images(pipe, 0, output_type="latent", callback_on_step_end=stop)
    assert len(record.calls) == 2
    assert pipe.interrupt
    assert found.equal(states[-1])
    assert images(pipe, 0).equal(before)


def test_a_run_that_fails_leaves_nothing_behind() -> None:
    pipe = tiny_pipeline(FlowMatchHeunDiscreteScheduler())
    before = images(pipe, 0, guidance_scale=2.0)

    def fail(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        images(pipe, 0, guidance_scale=3.0, callback_on_step_end=fail)
    assert images(pipe, 0, guidance_scale=2.0).equal(before)


# Patched.


def test_trace_of_an_unpatched_pipeline_is_empty() -> None:
    pipe = tiny_pipeline()
    assert pipe(0, 2, output_type="pt").trace is None
    assert pipe(0, 2, output_type="pt", return_trace=True).trace == []


@every_scheduler
def test_trace_of_a_patched_pipeline_has_every_call_of_the_latest_run(kind: str) -> None:
    scheduler, evaluations = SCHEDULERS[kind]
    pipe = tiny_pipeline(scheduler())
    with diffattn.patch(pipe, "mediator", schedule={0.6: {"num_mediators": 4}, 0.0: {"num_mediators": 16}}):
        runs = [pipe(0, 4, guidance_scale=2.0, output_type="pt", return_trace=True) for _ in range(2)]
    trace = runs[-1].trace
    assert len(trace) == evaluations(4)
    levels = [entry["noise_level"] for entry in trace]
    assert levels == pytest.approx([s.item() / 1000 for s in pipe.scheduler.timesteps], abs=1e-6)
    assert [entry["phase"] for entry in trace] == [int(level < 0.6) for level in levels]


# Saving and loading.


@every_scheduler
@pytest.mark.parametrize("with_vae", [False, True])
def test_a_saved_pipeline_draws_the_same(
    kind: str, with_vae: bool, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = tiny_pipeline(SCHEDULERS[kind][0](), vae=tiny_vae() if with_vae else None)
    pipe.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is SiTPipeline
    assert type(loaded.transformer) is DiT
    assert type(loaded.scheduler) is type(pipe.scheduler)
    assert loaded.scheduler.config.num_train_timesteps == 1000
    assert (loaded.vae is None) != with_vae
    assert loaded.config["id2label"] == NAMES
    assert loaded.labels == pipe.labels
    assert images(loaded, ["dog", 0], guidance_scale=2.0).equal(images(pipe, ["dog", 0], guidance_scale=2.0))
    assert caplog.text == ""
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_loading_in_half_precision_and_with_other_parts(tmp_path: Path) -> None:
    tiny_pipeline(vae=tiny_vae()).save_pretrained(tmp_path)
    scheduler = EulerMaruyamaScheduler(diffusion="linear")
    loaded = SiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, scheduler=scheduler, vae=None)
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.scheduler is scheduler
    assert loaded.vae is None


def test_loading_from_the_hub_takes_weights_and_configuration_only(tmp_path: Path) -> None:
    """From the hub's local cache, as an earlier download leaves it."""
    snapshot = tmp_path / "models--someone--sit" / "snapshots" / ("0" * 40)
    pipe = tiny_pipeline()
    pipe.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    loaded = SiTPipeline.from_pretrained("someone/sit", cache_dir=tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert images(loaded, 0).equal(images(pipe, 0))


def test_from_pipe_and_components_keep_the_names() -> None:
    pipe = tiny_pipeline()
    again = SiTPipeline(**pipe.components, id2label=pipe.config.id2label)
    assert again.labels == pipe.labels
    assert SiTPipeline.from_pipe(pipe).labels == pipe.labels


def test_the_progress_bar_counts_evaluations(capsys: Any) -> None:
    pipe = tiny_pipeline(FlowMatchHeunDiscreteScheduler())
    pipe.set_progress_bar_config(disable=False)
    images(pipe, 0)
    assert "7/7" in capsys.readouterr().err


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(class_labels=5), "class ids are from 0 to 4, got 5"),
        (dict(class_labels="cow"), "unknown class name 'cow'; names are bird, cat"),
        (dict(class_labels="crane"), "'crane' has several ids"),
        (dict(class_labels=[]), "class_labels is empty"),
        (dict(num_inference_steps=0), "num_inference_steps must be 1 or more, got 0"),
        (dict(num_images_per_label=0), "num_images_per_label must be 1 or more, got 0"),
        (dict(guidance_scale=-1.0), "guidance_scale must be 0 or more, got -1.0"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be 0 or more, got nan"),
        (dict(guidance_channels=5), "guidance_channels must be 1 to 4, or None for all, got 5"),
        (dict(height=17), "height must be a positive multiple of 2 pixels, got 17"),
        (dict(width=0), "width must be a positive multiple of 2 pixels, got 0"),
        (dict(generator=seeded(0, 1)), "one for each of the 1 images; got 2"),
        (dict(latents=torch.zeros(2, 4, 16, 16)), r"latents must have the shape \[1, 4, 16, 16\] here, got \[2, 4"),
        (dict(latents=torch.zeros(1, 4, 16, 16), height=8), r"latents must have the shape \[1, 4, 8, 16\] here"),
        (dict(output_type="png"), "output_type must be one of pil, np, pt, latent, got 'png'"),
        (dict(output_type="pil"), "output_type 'pil' needs a VAE, or 1 or 3 channels; this model draws 4"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "may have latents, got noise"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    pipe = tiny_pipeline()
    record = Recorder(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        pipe(**(dict(class_labels=0, num_inference_steps=2, output_type="pt") | options))
    assert record.calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_inference_steps=2.5), "num_inference_steps must be a whole number, got 2.5"),
        (dict(num_images_per_label=True), "num_images_per_label must be a whole number, got True"),
        (dict(height=16.0), "height must be a whole number, got 16.0"),
        (dict(guidance_scale="2"), "guidance_scale must be a number, got '2'"),
        (dict(guidance_channels=1.5), "guidance_channels must be a whole number, got 1.5"),
        (dict(generator=tuple(seeded(0))), "generator must be a torch.Generator, or a list of them, got tuple"),
        (dict(generator=[0]), "generator must be a torch.Generator, or a list of them, got int"),
    ],
)
def test_values_of_another_type(options: dict[str, Any], message: str) -> None:
    pipe = tiny_pipeline()
    record = Recorder(pipe.transformer)
    with pytest.raises(TypeError, match=message):
        pipe(**(dict(class_labels=0, num_inference_steps=2, output_type="pt") | options))
    assert record.calls == []


def test_schedulers_whose_time_rises_or_whose_noise_is_of_another_path() -> None:
    with pytest.raises(ValueError, match="invert_sigmas must be False"):
        tiny_pipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    tiny_pipeline(stochastic)
    with pytest.raises(ValueError, match=r"stochastic_sampling follows the linear path.*path='gvp'"):
        SiTPipeline(tiny_dit(path="gvp"), stochastic)


def test_guidance_needs_a_null_class() -> None:
    pipe = tiny_pipeline(null_class=False)
    assert images(pipe, 0).isfinite().all()
    with pytest.raises(ValueError, match=r"guidance_scale=4.0 needs a model with a null class"):
        images(pipe, 0, guidance_scale=4.0)


def test_models_that_predict_noise_are_sent_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"predict the velocity; this DiT has prediction='epsilon'.*DiTPipeline"):
        SiTPipeline(tiny_dit(prediction="epsilon", time_direction="data_to_noise"), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="time_direction 'noise_to_data', got 'data_to_noise'"):
        SiTPipeline(tiny_dit(time_direction="data_to_noise"), FlowMatchEulerDiscreteScheduler())


def test_schedulers_for_other_models_are_refused() -> None:
    message = "one of FlowMatchEulerDiscreteScheduler, .*, EulerMaruyamaScheduler; got DDIMScheduler"
    with pytest.raises(TypeError, match=message):
        tiny_pipeline(DDIMScheduler())
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(TypeError, match=message):
        images(pipe, 0)


def test_names_of_classes_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="class ids are from 0 to 4, got 5"):
        SiTPipeline(tiny_dit(), FlowMatchEulerDiscreteScheduler(), id2label={5: "cow"})

"""SADA: its formulas against exact answers, and what it does to a pipeline and leaves behind."""

import sys
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from support import tiny
from torch import Tensor, nn

from diffattn.patching.patch import find_patch

sys.path.insert(0, str(File(__file__).parents[2] / "pipelines"))

from peers import LeftOut, Setting, apply
from peers.sada import Window, sada
from peers.trajectory import Path, adams_moulton, is_stable, lagrange

SETTING = Setting(min_tokens=0)
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddim, v, zero signal at the start": (
        DDIMScheduler,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "ddim, x0": (DDIMScheduler, {"prediction_type": "sample"}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++, v, karras": (
        DPMSolverMultistepScheduler,
        {"prediction_type": "v_prediction", "use_karras_sigmas": True},
    ),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler, v": (EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
}


def scheduler(name: str) -> Any:
    kind, changed = SAMPLERS[name]
    return kind.from_config(tiny.scheduler().config, **changed)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory):
    return tiny.pipeline("sd", tmp_path_factory.mktemp("pipe"))


@pytest.fixture(params=SAMPLERS)
def sampled(pipe, request):
    """The pipeline with one sampler after the other."""
    before, pipe.scheduler = pipe.scheduler, scheduler(request.param)
    yield pipe
    pipe.scheduler = before


def latents(draw: Any, **changed: Any) -> Tensor:
    """Of two pictures in 20 steps; arguments that are None are not given."""
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    usual = dict(prompt=["a", "b"], num_inference_steps=20, guidance_scale=3.0, generator=generators,
                 output_type="latent", height=32, width=32)  # fmt: skip
    return draw(**{name: value for name, value in (usual | changed).items() if value is not None}).images


@pytest.fixture
def asked(pipe) -> Iterator[list[int]]:
    """Grows by the batch of every call that the UNet computes."""
    found: list[int] = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda module, args, out: found.append(len(out)))
    yield found
    hook.remove()


def always(*_: Tensor) -> bool:
    return True


def never(*_: Tensor) -> bool:
    return False


def test_adams_moulton_is_exact_where_the_gradient_is_linear():
    at = [torch.tensor([2.0, -1.0]) + torch.tensor([0.5, 3.0]) * i for i in range(3)]  # y of steps 0, 1, 2
    found = adams_moulton(torch.tensor([7.0, 7.0]), at[2], at[1], at[0])
    exact = torch.tensor([7.0, 7.0]) + at[2] + torch.tensor([0.5, 3.0]) / 2
    torch.testing.assert_close(found, exact)


def test_four_nodes_determine_a_cubic():
    def cubic(i: int) -> Tensor:
        return torch.tensor([1.0, -0.1, 0.02]) * i**3 - 5 * i + 2

    nodes = {i: cubic(i) for i in (12, 9, 5, 2)}
    for i in (14, 9, 7):
        torch.testing.assert_close(lagrange(nodes, i), cubic(i))


@pytest.mark.parametrize(("ratio", "stable"), [(0.5, True), (0.0, True), (2.0, False), (3.0, False)])
def test_under_eulers_method_a_gradient_is_stable_whose_changes_shrink(ratio, stable):
    x, y_2, change = torch.zeros(3), torch.ones(3), torch.tensor([1.0, -2.0, 0.5])
    y_1 = y_2 + change
    y = y_1 + ratio * change
    assert is_stable(x + y, adams_moulton(x, y, y_1, y_2), y, y_1, y_2) is stable


def test_a_straight_line_is_stable():
    x, y = torch.zeros(3), torch.tensor([0.25, 1.0, -3.0])
    assert is_stable(x + y, adams_moulton(x, y, y, y), y, y, y)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_path_reads_outputs_as_the_sampler_does(name):
    sampler = scheduler(name)
    sampler.set_timesteps(20)
    x, output = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for first in (0, 7):
        time = sampler.timesteps[first]
        path = Path.of(sampler, time)
        sampler.set_timesteps(20)
        if isinstance(sampler, DPMSolverMultistepScheduler | UniPCMultistepScheduler):
            sampler._init_step_index(time)
            clean = sampler.convert_model_output(output, sample=x)
        else:
            sampler.is_scale_input_called = True
            clean = sampler.step(output, time, x).pred_original_sample
        torch.testing.assert_close(path.clean(0, output, x), clean, rtol=1e-3, atol=1e-4)
        assert path.steps == 20 - first
    torch.testing.assert_close(path.output(0, clean, x), output, rtol=1e-3, atol=1e-4)


class Stub(nn.Module):
    """A denoiser whose answer is a function of the time step alone, and which counts its calls."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.calls = answer, 0

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        return self.answer(timestep)


def eighths(seed: int) -> Tensor:
    """Numbers with so few bits that sums and products are exact."""
    return torch.randint(-16, 17, (1, 2, 4, 4), generator=torch.Generator().manual_seed(seed)) / 8


class Loop:
    """A sampling loop around a denoiser and a scheduler whose steps are set anew by `prepare`."""

    def __init__(self, unet: Stub, sampler: Any, prepare: dict[str, Any]) -> None:
        self.unet, self.scheduler, self.prepare = unet, sampler, prepare

    def __call__(self) -> Tensor:
        self.scheduler.set_timesteps(**self.prepare)
        self.unet.calls = 0
        x = eighths(seed=0)
        for t in self.scheduler.timesteps:
            output = self.unet(self.scheduler.scale_model_input(x, t), t)
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return x


def test_a_straight_trajectory_is_skipped_and_reproduced():
    """Constant noise and evenly spaced σ: every formula is exact, and the criterion finds nothing to object to."""
    noise = eighths(seed=1)
    levels = [i / 8 for i in range(50, -1, -1)]
    loop = Loop(Stub(lambda t: noise), EulerDiscreteScheduler(), {"sigmas": levels})
    exact = loop()
    assert loop.unet.calls == 50
    with sada(loop, loop, Setting(steps=50)) as draw:
        found = draw()
    assert loop.unet.calls == 25
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_a_cubic_trajectory_of_x0_is_reproduced_by_lagrange():
    """x0 is a cubic of the time step; the criterion first holds where the multistep part begins."""
    sampler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    slopes = torch.randn(3, 1, 2, 4, 4, generator=torch.Generator().manual_seed(1))

    def cubic(t: Tensor) -> Tensor:
        u = t / 1000
        return slopes[0] * u + slopes[1] * u**2 + slopes[2] * u**3

    loop = Loop(Stub(cubic), sampler, {"num_inference_steps": 50})
    exact = loop()
    window = Window.of(50)
    answers = iter([False] * (window.multistep - window.first) + [True])
    with sada(loop, loop, Setting(steps=50), lambda *_: next(answers)) as draw:
        found = draw()
    assert loop.unet.calls == 32  # of the steps 24 to 46 every fourth is asked for
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_criterion_that_never_holds_leaves_every_bit(sampled):
    exact = latents(sampled)
    with sada(sampled, sampled, SETTING, never) as draw:
        assert torch.equal(latents(draw), exact)


@pytest.mark.slow
def test_fewer_calls_close_to_the_exact_latents_and_nothing_left(sampled, asked):
    exact = latents(sampled)
    before = [sorted(vars(x)) for x in (sampled, sampled.scheduler, *sampled.unet.modules())]
    assert len(asked) == 20
    with apply("sada", sampled, SETTING) as draw:
        found = latents(draw)
        calls = len(asked) - 20
        assert torch.equal(latents(draw), found), "a second run is not the first"
    assert 13 <= calls < 20
    assert not torch.equal(found, exact)
    error = (found - exact).norm() / exact.norm()
    assert error < 0.1
    assert [sorted(vars(x)) for x in (sampled, sampled.scheduler, *sampled.unet.modules())] == before
    assert torch.equal(latents(sampled), exact)


@pytest.mark.slow
def test_everything_is_put_back_after_an_exception(pipe):
    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        raise KeyboardInterrupt

    exact = latents(pipe)
    with pytest.raises(KeyboardInterrupt), apply("sada", pipe, SETTING) as draw:
        latents(draw, callback_on_step_end=interrupt)
    assert "step" not in vars(pipe.scheduler)
    assert "forward" not in vars(pipe.unet)
    assert torch.equal(latents(pipe), exact)


@pytest.mark.slow
def test_an_interrupted_run_says_nothing_to_the_next(pipe):
    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == 6:
            raise KeyboardInterrupt
        return {}

    with apply("sada", pipe, SETTING) as draw:
        whole = latents(draw)
        with pytest.raises(KeyboardInterrupt):
            latents(draw, callback_on_step_end=interrupt)
        assert torch.equal(latents(draw), whole)


@pytest.mark.slow
def test_sada_and_agents_in_either_order(pipe, asked):
    found = {}
    for name in ("agent+sada", "sada+agent"):
        asked.clear()
        with apply(name, pipe, SETTING) as draw:
            found[name] = latents(draw)
            handle = find_patch(pipe)
            assert handle is not None
            assert handle.report().layers_accelerated > 0
        assert len(asked) < 20
    with apply("agent", pipe, SETTING) as draw:
        agents = latents(draw)
    assert torch.equal(found["agent+sada"], found["sada+agent"])
    error = (found["agent+sada"] - agents).norm() / agents.norm()
    assert 0 < error < 0.1


def test_a_batch_of_another_size_is_computed(pipe, asked):
    """Guidance ends after step 9: the next step, which would be skipped, has half the batch."""

    def end_guidance(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 9:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}
        return {}

    with sada(pipe, pipe, SETTING, always) as draw:
        found = latents(draw, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert found.isfinite().all()
    assert asked == [4] * 7 + [2] * 7  # at steps 0 to 3, 5, 7 and 9; at 10, 11, 13, 15 and 17 to 19


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changed"),
    [("sdxl", {}), ("img2img", {"image": tiny.picture(), "strength": 0.6, "height": None, "width": None})],
)
def test_other_pipelines(kind, changed, tmp_path):
    pipe: Any = tiny.pipeline(kind, tmp_path)
    exact = latents(pipe, **changed)
    with sada(pipe, pipe, SETTING, never) as draw:
        assert torch.equal(latents(draw, **changed), exact)
    with sada(pipe, pipe, SETTING, always) as draw:
        error = (latents(draw, **changed) - exact).norm() / exact.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        (DDIMScheduler(), 6, "runs of 10 steps or more, not of 6"),
        (PNDMScheduler(), 20, "not PNDMScheduler with epsilon"),
        (FlowMatchEulerDiscreteScheduler(), 20, "not FlowMatchEulerDiscreteScheduler"),
        (EulerAncestralDiscreteScheduler(), 20, "not EulerAncestralDiscreteScheduler"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 20, "deterministic"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), 20, "flow_prediction"),
    ],
)
def test_what_sada_is_not_for_is_left_out(sampler, steps, message):
    loop = Loop(Stub(None), sampler, {})
    with pytest.raises(LeftOut, match=message), sada(loop, loop, Setting(steps=steps)):
        pass
    assert "forward" not in vars(loop.unet)


def test_the_published_times_of_50_steps_are_scaled_to_other_runs():
    assert Window.of(50) == Window(10, 24, 47, 4)
    assert Window.of(20) == Window(4, 9, 18, 2)
    assert Window.of(10) == Window(3, 4, 9, 2)

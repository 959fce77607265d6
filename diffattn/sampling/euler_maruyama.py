"""The SDE of SiT (Ma et al., ECCV 2024, section 2.4) by Euler-Maruyama steps, as a diffusers scheduler.

Shapes: B batch, the rest of a sample's shape is free. Symbols as in `paths`: t from 0 (noise) to 1 (data), v the
velocity, s the score, D the diffusion coefficient, z standard normal noise.
"""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffattn.sampling.diffusion import DIFFUSIONS
from diffattn.sampling.paths import PATHS

LAST_STEPS = ("mean", "euler", "tweedie", None)


class EulerMaruyamaScheduler(SchedulerMixin, ConfigMixin):
    """Euler-Maruyama steps x ← x + [v + D·s]Δt + √(2DΔt)·z, and a last one without noise.

    In the convention of diffusers' flow matching: a time step is num_train_timesteps·(1 - t) and falls, and the model
    output is noise minus data, that is -v.

    Args:
        num_train_timesteps: the time step of pure noise.
        path: on which the model was trained, "linear" or "gvp"; `transformer.config.path` of a `DiT`.
        diffusion: the form of D, see `diffusion.DIFFUSIONS`.
        diffusion_norm: its strength c.
        last_step: from t = 1 - last_step_size to 1. "mean": a step like all others, without noise; "euler": of the ODE;
            "tweedie": the expected data; None: no last step, noisy steps lead up to t = 1.
        last_step_size: of the last step, in t.
        sbdm_start: t at which "sbdm" starts, since its D is infinite at 0. The other forms start at 0.

    Raises:
        ValueError: naming the value that does not fit, and what is allowed.
    """

    _compatibles = []  # noqa: RUF012, as diffusers declares it
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path: str = "linear",
        diffusion: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str | None = "mean",
        last_step_size: float = 0.04,
        sbdm_start: float = 0.01,
    ) -> None:
        _check(path in PATHS, "path", path, f"one of {', '.join(PATHS)}")
        _check(diffusion in DIFFUSIONS, "diffusion", diffusion, f"one of {', '.join(DIFFUSIONS)}")
        _check(last_step in LAST_STEPS, "last_step", last_step, f"one of {', '.join(map(str, LAST_STEPS))}")
        _check(diffusion_norm >= 0, "diffusion_norm", diffusion_norm, "at least 0")
        _check(0 < last_step_size < 1, "last_step_size", last_step_size, "between 0 and 1")
        _check(0 < sbdm_start < 1 - last_step_size, "sbdm_start", sbdm_start, "between 0 and 1 - last_step_size")
        self.path = PATHS[path]
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32)
        self._times = torch.empty(0, dtype=torch.float64)  # t of every step, on the host
        self._dt = 0.0
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Steps taken since `set_timesteps`, from `begin_index` on; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """See `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of `timesteps` at which the steps begin, which saves looking it up on the device."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set a uniform grid.

        Args:
            num_inference_steps: N evaluations of the model. With a last step, N - 1 noisy ones lead to
                t = 1 - last_step_size, and the N-th is the last step; without, N noisy ones lead to t = 1.
            device: of `timesteps`.

        Raises:
            ValueError: too few steps.
        """
        config, fewest = self.config, 1 if self.config["last_step"] is None else 2
        _check(num_inference_steps >= fewest, "num_inference_steps", num_inference_steps, f"at least {fewest}")
        start = config["sbdm_start"] if config["diffusion"] == "sbdm" else 0.0
        if config["last_step"] is None:
            times = torch.linspace(start, 1, num_inference_steps + 1, dtype=torch.float64)[:-1]
            self._dt = (1 - start) / num_inference_steps
        else:
            end = 1 - config["last_step_size"]
            times = torch.linspace(start, end, num_inference_steps, dtype=torch.float64)
            self._dt = (end - start) / (num_inference_steps - 1)
        self._times = times
        self.timesteps = (config["num_train_timesteps"] * (1 - times)).to(torch.float32).to(device)
        self.num_inference_steps = num_inference_steps
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Step from one time step to the next. Does not synchronise the device if `set_begin_index` was called.

        Args:
            model_output: -v [B, ...].
            timestep: one of `timesteps`.
            sample: x [B, ...].
            generator: of z, or one per sample.
            return_dict: False for a plain tuple.
            noise: z [B, ...], instead of drawing it.

        Returns:
            `.prev_sample` [B, ...], in fp32, or in fp64 if the sample is.

        Raises:
            ValueError: `set_timesteps` was not called; all steps have been taken; an unknown time step.
        """
        i = self._next_index(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        v = -model_output.to(x.dtype)
        t = self._times[i].to(x.dtype)  # a scalar on the host, as D
        D = DIFFUSIONS[self.config["diffusion"]](self.path, t, self.config["diffusion_norm"])
        if self.config["last_step"] is not None and i == len(self._times) - 1:
            x = self._last_step(x, v, t, D)
        else:
            dt = self._dt
            z = randn_tensor(x.shape, generator, x.device, x.dtype) if noise is None else noise.to(x)
            x = x + (v + D * self.path.score(v, x, t)) * dt + torch.sqrt(2 * D * dt) * z
        self._step_index = i + 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _last_step(self, x: Tensor, v: Tensor, t: Tensor, D: Tensor) -> Tensor:
        """The step to t = 1, without noise."""
        dt = self.config["last_step_size"]
        match self.config["last_step"]:
            case "mean":
                return x + (v + D * self.path.score(v, x, t)) * dt
            case "euler":
                return x + v * dt
            case _:
                return self.path.data_estimate(v, x, t)  # = (x + σ²s)/α, Tweedie's formula

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Noise clean samples [B, ...] to time steps, scalar or [B]: x_t = α·data + σ·noise [B, ...]."""
        t = 1 - torch.as_tensor(timestep, device=sample.device, dtype=sample.dtype) / self.config["num_train_timesteps"]
        return self.path.interpolate(sample, noise, t)

    def _next_index(self, timestep: Tensor | float) -> int:
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        i = self._step_index
        if i is None:
            i = self._index_of(float(timestep)) if self._begin_index is None else self._begin_index
        if i >= len(self._times):
            raise ValueError(f"all {len(self._times)} steps have been taken; call set_timesteps to start again")
        return i

    def _index_of(self, timestep: float) -> int:
        distance = (self.config["num_train_timesteps"] * (1 - self._times) - timestep).abs()
        nearest = int(distance.argmin())
        if distance[nearest] > 1e-6 * self.config["num_train_timesteps"]:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
        return nearest

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")

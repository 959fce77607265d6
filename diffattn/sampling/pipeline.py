"""A diffusers pipeline for SiT: images from class labels.

Shapes: B images, c channels, H height and W width of the latents (of the pixels without a VAE). Time t runs from 0
(noise) to 1 (data).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from diffattn.models import DiT
from diffattn.patching.patch import find_patch
from diffattn.sampling.euler_maruyama import EulerMaruyamaScheduler
from diffattn.sampling.grids import set_uniform_timesteps, times
from diffattn.sampling.inputs import (
    Generators,
    check_at_least_1,
    check_generators,
    check_guidance,
    check_output_type,
    check_scheduler,
    check_tensor_inputs,
    check_velocity_model,
    latent_shape,
)
from diffattn.sampling.labels import ClassNames

Labels = int | str | Sequence[int | str]


@dataclass
class SiTPipelineOutput(BaseOutput):
    """What `SiTPipeline` returns."""

    images: list[Image.Image] | np.ndarray | Tensor
    """B pictures; [B, H, W, c] or [B, c, H, W] in [0, 1]; or latents [B, c, H, W]."""
    trace: list[dict[str, Any]] | None = None
    """Every call of the transformer, see `Patch.trace`; empty if it is not patched, None if not requested."""


class SiTPipeline(DiffusionPipeline):
    """Images from class labels with a velocity model (Ma et al., "SiT", ECCV 2024).

    A saved pipeline is loaded with `SiTPipeline.from_pretrained`, from a folder or from the hub. diffusers' own
    `DiffusionPipeline.from_pretrained` only knows pipeline classes of diffusers. `model_index.json` names the modules
    that define the parts (such as `diffattn.models.dit`), so their names belong to the format.

    Args:
        transformer: a `DiT` that predicts the velocity.
        scheduler: `FlowMatchEulerDiscreteScheduler` or `FlowMatchHeunDiscreteScheduler` for the ODE,
            `EulerMaruyamaScheduler` for the SDE.
        vae: decodes the latents; None: the transformer draws pixels from -1 to 1.
        id2label: class id -> its names, separated by commas.
        guidance_scale: the model's own, the default of a call; saved with the pipeline. None: 1, no
            guidance.

    Raises:
        ValueError: the transformer predicts noise, or was trained on another path than the SDE's; an id out of range;
            guidance below 0, or other than 1 for a transformer without a null class.
        TypeError: a scheduler that does not sample velocity models.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012, as diffusers declares it
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: DiT,
        scheduler: FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler | EulerMaruyamaScheduler,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_velocity_model(transformer)
        check_scheduler(scheduler, transformer)
        if guidance_scale is not None:
            check_guidance(transformer.config, guidance_scale, None)
        self.class_names = ClassNames(id2label, transformer.config["num_classes"])
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=self.class_names.id2label, guidance_scale=guidance_scale)
        self.image_processor = VaeImageProcessor()
        self._guidance_scale = 1.0
        self._guidance_channels: int | None = None
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch a saved pipeline from the hub: its JSON and safetensors files, and no code.

        Args:
            pretrained_model_name: "owner/name".
            **kwargs: cache_dir, revision, token, force_download, local_files_only as in diffusers.

        Returns:
            The folder.
        """
        passed_on = ("cache_dir", "revision", "token", "force_download", "local_files_only")
        options = {name: kwargs[name] for name in passed_on if kwargs.get(name) is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=["*.json", "*.safetensors"], **options)

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> id."""
        return self.class_names.labels

    def get_label_ids(self, label: Labels) -> list[int]:
        """Class ids of a name, an id, or a list of both.

        Raises:
            ValueError: an unknown or ambiguous name, or an id out of range; the message says what is allowed.
        """
        return self.class_names.ids(label)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along the side of a latent."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def own_guidance(self) -> float:
        """The default guidance scale of a call: the one saved with the model, else 1."""
        saved = self.config.get("guidance_scale")
        return 1.0 if saved is None else float(saved)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current run."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the transformer runs with and without class."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the velocity in the latest run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether to stop: set `pipe._interrupt = True` in a callback to end the run before its next step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_channels: int | None = None,
        num_images_per_label: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_trace: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> SiTPipelineOutput | tuple[Any, ...]:
        """Draw images.

        Args:
            class_labels: a class id (int) or name (str), or a list of them; see `ClassNames.ids`.
            num_inference_steps: N steps on a uniform grid. Heun evaluates the transformer 2N - 1 times, the others N.
            guidance_scale: w of v = v_null + w·(v_class - v_null); 1 is no guidance; None: see `own_guidance`.
            guidance_channels: guide only the first so many channels, the official samplers 3 of 4; None: all.
            num_images_per_label: of each label, side by side.
            height, width: in pixels, multiples of the patch size times the VAE's factor; None: as trained.
            generator: of the noise, or one per image, which makes an image independent of those beside it.
            latents: start from this noise [B, c, H, W].
            output_type: "pil", "np", "pt", or "latent" to leave out the VAE.
            return_dict: False for a tuple (images,), or (images, trace).
            return_trace: also return a record of what a patch did in every call.
            callback_on_step_end: called as f(pipe, step, timestep, tensors) after every evaluation; it may return
                other tensors to continue with.
            callback_on_step_end_tensor_inputs: names of the tensors passed to it; only "latents" is available.

        Returns:
            `.images`, and `.trace`. The state between the steps is fp32, whatever the transformer is.

        Raises:
            ValueError, TypeError: naming the value that does not fit, and what is allowed.
        """
        check_velocity_model(self.transformer)
        check_scheduler(self.scheduler, self.transformer)
        check_at_least_1("num_inference_steps", num_inference_steps)
        check_at_least_1("num_images_per_label", num_images_per_label)
        guidance_scale = self.own_guidance if guidance_scale is None else guidance_scale
        check_guidance(self.transformer.config, guidance_scale, guidance_channels)
        check_output_type(self.transformer.config, output_type, self.vae is not None)
        check_tensor_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        ids = [label for label in self.get_label_ids(class_labels) for _ in range(num_images_per_label)]
        check_generators(generator, len(ids))
        shape = latent_shape(self.transformer.config, self.vae_scale_factor, len(ids), height, width, latents)
        self._guidance_scale, self._guidance_channels, self._interrupt = guidance_scale, guidance_channels, False

        device = self._execution_device
        x = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device).float()
        y = torch.tensor(ids, device=device)
        set_uniform_timesteps(
            self.scheduler, num_inference_steps, "cpu"
        )  # where patches read times without synchronising
        timesteps, t = self.scheduler.timesteps, times(self.scheduler)
        self._num_timesteps = len(timesteps)
        if patch := find_patch(self.transformer):
            patch.expect_new_run()
        with self.progress_bar(total=len(timesteps)) as progress:  # type: ignore[call-arg]
            for i, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                v = self._velocity(x, t[i], y)
                x = self.scheduler.step(-v, timestep, x, generator=generator, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                    x = (callback_on_step_end(self, i, timestep, tensors) or {}).get("latents", x)
                progress.update()

        images = self._decode(x, output_type)
        trace = (patch.trace() if patch else []) if return_trace else None
        self.maybe_free_model_hooks()
        output = SiTPipelineOutput(images=images, trace=trace)
        return output if return_dict else (images,) if trace is None else (images, trace)

    def _velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """v [B, c, H, W] at x and a scalar t, guided, in the dtype of x."""
        if not self.do_classifier_free_guidance:
            return self._denoise(x, t, y)
        null = torch.full_like(y, self.transformer.config.num_classes)
        uncond, cond = self._denoise(torch.cat([x, x]), t, torch.cat([null, y])).chunk(2)
        guided = uncond + self._guidance_scale * (cond - uncond)
        k = self._guidance_channels
        return guided if k is None else torch.cat([guided[:, :k], cond[:, k:]], dim=1)

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.transformer(x.to(self.transformer.dtype), t.expand(len(x)), y).sample.to(x.dtype)

    def _decode(self, x: Tensor, output_type: str) -> Any:
        """Latents [B, c, H, W] to images."""
        if output_type == "latent":
            return x
        if self.vae is not None:
            config = self.vae.config
            x = x / (config.scaling_factor or 1) + (config.get("shift_factor") or 0)
            x = self.vae.decode(x.to(self.vae.dtype)).sample.float()
        return self.image_processor.postprocess(x, output_type)

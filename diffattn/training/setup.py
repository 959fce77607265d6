"""The set-up of a run: data, model arguments, processes, and its cost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from diffusers import AutoencoderKL

from diffattn.data import check_balance, open_dataset
from diffattn.models.convert import check_loaded
from diffattn.training.accelerator import hardware_of, make_accelerator
from diffattn.training.config import TrainConfig
from diffattn.training.plan import TrainPlan, make_plan

Say = Callable[[str], None]


@dataclass
class TrainSetup:
    """What a run needs before its first step."""

    config: TrainConfig
    accelerator: Accelerator
    dataset: Any
    vae: AutoencoderKL | None
    arguments: dict[str, Any]  # of the DiT
    plan: TrainPlan
    say: Say


def set_up(config: TrainConfig, device: str = "auto", say: Say = print) -> TrainSetup:
    """Open the data, configure the model, count the cost. Nothing is written.

    Raises:
        ValueError: see `TrainConfig`, `make_accelerator`, `open_dataset`, `open_vae`, `DiT`; a batch size that is not
            divisible.
    """
    accelerator = make_accelerator(config, device)
    say = say if accelerator.is_main_process else lambda line: None
    processes = accelerator.num_processes
    if config.optim.batch % processes:
        raise ValueError(f"optim.batch={config.optim.batch} does not divide into {processes} processes")
    if not config.data.source:
        raise ValueError("data.source must name the pictures: a folder, a zip, or a Hugging Face dataset")
    data = config.data
    dataset = open_dataset(data.source, data.size, split=data.split, label=data.label, skip_bad=data.skip_bad)
    for line in (*check_balance(dataset).lines(), *dataset.lines()):
        say(line)
    vae = None if data.vae is None else open_vae(data.vae)
    shape = dataset.shape if vae is None else latent_shape(vae, data.size)
    arguments = config.model_arguments() | {
        "in_channels": shape[0],
        "sample_size": shape[1],
        "num_classes": len(dataset.class_names),
        "null_class": config.objective.label_dropout > 0,
    }
    for line in config.objective.warnings():
        say(line)
    plan = make_plan(config, arguments, len(dataset), hardware_of(accelerator))
    return TrainSetup(config, accelerator, dataset, vae, arguments, plan, say)


def open_vae(source: str) -> AutoencoderKL:
    """A frozen autoencoder from a folder or the hub.

    Raises:
        ValueError: it does not exist or cannot be read; missing and unexpected weights are named.
    """
    try:
        loaded: Any = AutoencoderKL.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"data.vae={source!r} cannot be loaded as an AutoencoderKL: {error}") from None
    vae, loading_info = loaded
    check_loaded(source, loading_info)
    return vae.eval().requires_grad_(False)


def latent_shape(vae: AutoencoderKL, size: int) -> tuple[int, int, int]:
    """(c, h, w) of the latents of square pictures of this size.

    Raises:
        ValueError: the size is not a multiple of the autoencoder's factor.
    """
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if size % factor:
        raise ValueError(f"data.size must be a multiple of {factor} for this autoencoder, got {size}")
    return vae.config["latent_channels"], size // factor, size // factor

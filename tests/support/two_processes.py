"""What two processes draw together, for tests/coexistence/test_processes.py:

    python -m torch.distributed.run --nproc_per_node=2 tests/support/two_processes.py FOLDER

Every process writes `FOLDER/RANK.pt`: what it found, by name.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from support.coexistence import Subject, make, processors, reasons

PROMPTS = ("a cat", "a dog", "a tent", "a key")
SUBJECTS = ("UNet2DConditionModel", "FluxTransformer2DModel")

Found = dict[str, Any]


def share(subject: Subject, state: PartialState) -> list[Tensor]:
    """The latents of all prompts, of which every process draws its part."""
    with subject.patch(), state.split_between_processes(list(PROMPTS)) as mine:
        return gather_object([subject.draw(prompt=prompt) for prompt in mine])


def shard(subject: Subject, mesh: DeviceMesh) -> Found:
    """Latents without and with a patch of a denoiser whose weights are sharded, patched before and after that."""
    early = subject.patch()
    subject.draw()
    blocks = [part for name, part in subject.denoiser.named_children() if name.endswith("blocks")]
    for block in [block for blocks in blocks for block in blocks]:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(subject.denoiser, mesh=mesh)
    patched_before = subject.draw()
    early.remove()
    exact, before = subject.draw(), processors(subject)
    handle = subject.patch()
    accelerated, report = subject.draw(), handle.report()
    handle.remove()
    return {
        "exact": exact,
        "accelerated": accelerated,
        "patched before": patched_before,
        "layers": (report.layers_accelerated, report.layers_patched, subject.num_layers),
        "restored": torch.equal(subject.draw(), exact) and processors(subject) == before,
    }


def split_tokens(subject: Subject, mesh: DeviceMesh) -> Found:
    """Latents of a patched and an unpatched denoiser whose tokens are split between the processes."""
    handle = subject.patch()
    subject.draw()
    calls = handle.report().calls_accelerated
    enable_context_parallelism(subject.denoiser, mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patched = subject.draw()
    found = {
        "patched": patched,
        "reasons": reasons(handle),
        "accelerated": handle.report().calls_accelerated - calls,
        "warned": [str(warning.message) for warning in caught if "diffattn" in str(warning.message)],
    }
    handle.remove()
    return found | {"exact": subject.draw()}


def enable_context_parallelism(model: Any, mesh: DeviceMesh) -> None:
    """What `model.enable_parallelism` does, which counts accelerators and has none here."""
    config: Any = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    config.setup(dist.get_rank(), 2, torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    mesh = init_device_mesh("cpu", (2,))
    tokenizer = folder / f"tokenizer-{state.process_index}"
    found: Found = {}
    for name in SUBJECTS:
        found[f"share {name}"] = share(make(name, tokenizer), state)
        found[f"shard {name}"] = shard(make(name, tokenizer), mesh)
    for name in ("FluxTransformer2DModel", "WanTransformer3DModel"):
        rings = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
        found[f"split {name}"] = split_tokens(make(name, tokenizer), rings)
    torch.save(found, folder / f"{state.process_index}.pt")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The state of a run as named, unsharded tensors, whether or not the model is sharded."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole (collective: every process must call it), any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def digest(model: nn.Module) -> str:
    """SHA-256 of names and whole weights, one at a time on the CPU; every process must call it."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        value = whole(tensor).detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def model_tensors(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """All weights by name. Here and below, every process must make the call; without `keep` the result is empty."""
    return _wholes(model.state_dict().items(), keep)


def ema_tensors(ema: EMAModel, model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The averaged weights, by the model's parameter names."""
    names = (name for name, _ in model.named_parameters())
    return _wholes(zip(names, ema.shadow_params, strict=True), keep)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Optimizer state as "parameter/exp_avg" and so on; parameters that never had a gradient have none."""
    found = (
        (f"{name}/{key}", value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    )
    return _wholes(found, keep)


def _wholes(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Sharded tensors are gathered one at a time on the CPU, so that their device need not hold them all."""
    found = {}
    for name, tensor in tensors:
        value = whole(tensor)
        if keep:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


@torch.no_grad()
def restore(
    model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Restore what the functions above returned; raises `KeyError` if the model has other parameters."""
    own = model.state_dict()
    for name, target in own.items():
        _put(target, tensors["model"][name])
    for (name, parameter), average in zip(model.named_parameters(), ema.shadow_params, strict=True):
        _put(average, tensors["ema"][name])
        prefix = f"{name}/"
        found = {k.removeprefix(prefix): v for k, v in tensors["optimizer"].items() if k.startswith(prefix)}
        if found:
            optimizer.state[parameter] = {k: _state_like(parameter, v) for k, v in found.items()}


def _state_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A piece of optimizer state on its parameter's device, sharded like the parameter; step counts are scalars."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    state = torch.empty_like(parameter)
    _put(state, value)
    return state

"""Devices and precisions by name."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from support import tiny
from torch import nn

from diffattn.machine import choose_device, choose_dtype, describe_devices, dtype_name, execution_device, versions


def test_auto_is_the_first_there_is() -> None:
    fastest = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == choose_device().type == fastest
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "", "cpu:7", "cuda:99", "meta"])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}'.*allowed: auto.*cpu"):
        choose_device(name)


def test_precision() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (choose_dtype("auto", cpu), choose_dtype("auto", cuda)) == (torch.float32, torch.float16)
    for name in ("float32", "float16", "bfloat16"):
        assert dtype_name(choose_dtype(name, cpu)) == name
    with pytest.raises(ValueError, match=r"'float64'.*float32, float16, bfloat16"):
        choose_dtype("float64", cpu)


def test_descriptions() -> None:
    assert describe_devices()["cpu"]["name"]
    assert describe_devices()["cpu"]["threads"] == torch.get_num_threads()
    assert versions()["torch"] == torch.__version__


def test_a_model_computes_where_its_hooks_take_it() -> None:
    meta = torch.device("meta")

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    assert execution_device(model()).type == "cpu"
    assert execution_device(model().to("meta")) == meta
    whole, parts, joined = model(), model(), model()
    cpu_offload_with_hook(whole, meta)
    assert next(whole.parameters()).device.type == "cpu"
    assert execution_device(whole) == meta
    cpu_offload(parts, torch.device("cpu"))
    assert next(parts.parameters()).is_meta
    assert execution_device(parts).type == "cpu"
    for device in (None, meta):
        add_hook_to_module(joined, AlignDevicesHook(execution_device=device), append=True)
    assert execution_device(joined) == meta


def test_a_model_whose_blocks_are_offloaded_in_groups_computes_where_they_are_loaded() -> None:
    unet = tiny.unet()
    apply_group_offloading(unet, onload_device=torch.device("cpu:0"), offload_type="leaf_level")
    assert next(unet.parameters()).device == torch.device("cpu")
    assert execution_device(unet) == torch.device("cpu:0")

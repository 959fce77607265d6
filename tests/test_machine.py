"""Devices and precisions by name."""

import pytest
import torch

from diffattn.machine import choose_device, choose_dtype, describe_devices, dtype_name, versions


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

"""Models that several pipelines or threads share, and pipelines whose parts are exchanged after patching."""

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support import tiny
from support.patching import FEW, Make, call

import diffattn
from diffattn.patching.patch import find_patch


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


def beside(pipe: Any, **parts: Any) -> Any:
    """Another pipeline that shares all parts but those given."""
    other = type(pipe)(**(pipe.components | parts), requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def test_of_two_threads_that_patch_one_model_one_is_refused(pipe: DiffusionPipeline) -> None:
    made: list[diffattn.Patch] = []
    refused: list[str] = []
    together = threading.Barrier(4)

    def attempt() -> None:
        together.wait()
        try:
            made.append(diffattn.patch(pipe, **FEW))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(refused) == 3
    assert all("already patched" in message for message in refused)
    tiny.run(pipe)
    assert made[0].report().calls_accelerated


def test_a_controlnet_stays_with_the_pipeline_that_was_patched_first(make_pipeline: Make) -> None:
    first: Any = make_pipeline("controlnet")
    second = beside(first, unet=tiny.unet())
    mine = diffattn.patch(first, **FEW)
    expected = tiny.run(first)
    assert find_patch(second) is None
    diffattn.unpatch(second)  # has no patch of its own
    assert not mine.report().removed
    theirs = diffattn.patch(second, **FEW)
    assert {layer.name.partition(".")[0] for layer in theirs.report().layers}.isdisjoint({"controlnet"})
    assert any("controlnet belongs to the patch of another pipeline" in note for note in theirs.report().notes)
    tiny.run(second)
    assert theirs.report().calls_accelerated
    diffattn.unpatch(second)
    assert theirs.report().removed
    assert not mine.report().removed
    assert torch.equal(tiny.run(first), expected)


def test_a_denoiser_that_was_exchanged_is_told_of_and_restored(make_pipeline: Make) -> None:
    pipe: Any = make_pipeline("sd")
    old, handle = pipe.unet, diffattn.patch(pipe, **FEW)
    assert not any("draws with another" in note for note in handle.report().notes)
    pipe.unet = tiny.unet()
    tiny.run(pipe)
    assert any("draws with another UNet2DConditionModel" in note for note in handle.report().notes)
    assert find_patch(pipe) is None
    again = diffattn.patch(pipe, **FEW)
    assert handle.report().removed
    assert not old._forward_pre_hooks
    pipe.unet = old
    diffattn.unpatch(pipe)
    assert again.report().removed
    assert not any("draws with another" in note for note in handle.report().notes)


def test_a_denoiser_inside_of_another_module_or_copied_alone_is_not_exchanged(make_pipeline: Make) -> None:
    class Around(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

    pipe: Any = make_pipeline("sd")
    handle = diffattn.patch(pipe, **FEW)
    copied = find_patch(copy.deepcopy(pipe.unet))
    assert copied is not None
    assert copied is not handle
    pipe.unet = Around(pipe.unet)
    for found in (handle, copied):
        assert not any("draws with another" in note for note in found.report().notes)


def test_a_controlnet_whose_pipeline_is_gone_is_restored_and_patched_anew(make_pipeline: Make) -> None:
    first: Any = make_pipeline("controlnet")
    other = beside(first, unet=tiny.unet())
    diffattn.patch(first, **FEW)
    net = first.controlnet
    del first
    gc.collect()
    assert net._forward_pre_hooks
    diffattn.unpatch(other)
    assert not net._forward_pre_hooks
    handle = diffattn.patch(other, **FEW)
    other.unet = tiny.unet()
    again = diffattn.patch(other, **FEW)
    assert handle.report().removed
    assert not any("belongs to the patch of another" in note for note in again.report().notes)
    assert any(layer.name.startswith("controlnet.") for layer in again.report().layers)


def test_a_pipeline_that_cannot_be_hashed_is_patched(make_pipeline: Make) -> None:
    pipe: Any = make_pipeline("sd")

    class Equal(type(pipe)):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            return True

    pipe.__class__ = Equal
    handle = diffattn.patch(pipe, **FEW)
    diffattn.unpatch(pipe)
    assert handle.report().removed


def test_a_replica_that_shares_the_hooks_is_accelerated() -> None:
    unet: Any = tiny.unet()
    handle = diffattn.patch(unet, **FEW)
    call(unet._replicate_for_data_parallel())
    assert handle.report().calls_accelerated
    assert not handle.report().calls_passed_through


def test_a_pipeline_that_was_patched_is_freed(make_pipeline: Make) -> None:
    pipe: Any = make_pipeline("sd")
    diffattn.patch(pipe, **FEW)
    gone = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None


def test_without_a_home_directory_nothing_is_stored_and_one_warning_says_so(
    pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "DIFFATTN_THRESHOLDS", "DIFFATTN_CALIBRATE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with diffattn.patch(pipe, max_head_error=float("inf")):
        with pytest.warns(diffattn.DiffAttnWarning, match="could not be stored.*no home directory") as caught:
            tiny.run(pipe, height=64, width=64)
        assert len([w for w in caught if "stored" in str(w.message)]) == 1

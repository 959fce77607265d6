"""Pipelines that share parts, and saving."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support import tiny
from support.coexistence import Subject, agree, assert_all_accelerated, coexists, differ

import diffattn
from diffattn.patching.patch import find_patch


def other(subject: Subject) -> Subject:
    """Another kind of pipeline, with the same parts."""
    name = type(subject.target).__name__.replace("Pipeline", "Img2ImgPipeline")
    pipe: Any = getattr(diffusers, name).from_pipe(subject.target)
    pipe.set_progress_bar_config(disable=True)
    return Subject(pipe, subject.arguments | {"image": tiny.picture(), "strength": 1.0})


@pytest.mark.slow
@coexists(
    "two pipelines that share parts",
    "`from_pipe` before and after the patch",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="a patch of one is a patch of both; patching twice is an error; removed from either, both are as before",
)
def test_from_pipe(subject: Subject) -> None:
    twin = other(subject)
    exact = subject.draw(), twin.draw()
    handle = subject.patch()
    later = other(subject)
    own = subject.draw()
    assert_all_accelerated(handle, subject)
    differ(twin.draw(), exact[1])
    assert torch.equal(later.draw(), twin.draw())
    assert_all_accelerated(handle, subject)
    assert torch.equal(subject.draw(), own)
    with pytest.raises(ValueError, match="already patched, perhaps through a pipeline that shares it"):
        twin.patch()
    diffattn.unpatch(later.target)
    assert torch.equal(subject.draw(), exact[0])
    assert torch.equal(twin.draw(), exact[1])


def loaded(folder: Path, like: Subject) -> Subject:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "3" in type(like.target).__name__ else {}
    pipe: Any = type(like.target).from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return Subject(pipe, like.arguments)


@pytest.mark.slow
@coexists(
    "`save_pretrained`",
    "of a patched pipeline",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="what is saved loads unpatched and draws what the pipeline draws unpatched; the patch stays",
)
def test_save_pretrained(subject: Subject, tmp_path: Path) -> None:
    exact = subject.draw()
    subject.target.save_pretrained(tmp_path / "before")
    handle = subject.patch()
    accelerated = subject.draw()
    subject.target.save_pretrained(tmp_path / "patched")
    assert torch.equal(subject.draw(), accelerated)
    before, patched = (loaded(tmp_path / name, subject) for name in ("before", "patched"))
    assert patched.denoiser.state_dict().keys() == before.denoiser.state_dict().keys()
    assert find_patch(patched.target) is None
    assert torch.equal(patched.draw(), before.draw())
    agree(patched.draw(), exact)
    handle.remove()
    assert torch.equal(subject.draw(), exact)

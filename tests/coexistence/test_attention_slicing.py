"""Attention slicing, which installs its own processors in every layer. More in tests/patching/test_others.py."""

import pytest
from diffusers.models.attention_processor import SlicedAttnProcessor
from support.coexistence import Subject, agree, assert_all_accelerated, check, coexists, processors


@pytest.mark.slow
@coexists(
    "attention slicing",
    "enabled before and after the patch",
    on=["UNet2DConditionModel"],
    holds="the same pictures in either order; removed, slicing stays enabled",
)
def test_attention_slicing(subject: Subject) -> None:
    own = subject.draw_patched()
    handle = subject.patch()
    subject.draw()
    subject.target.enable_attention_slicing(1)
    agree(subject.draw(), own)
    assert_all_accelerated(handle, subject)
    handle.remove()
    kinds = {type(p) for name, p in processors(subject).items() if "attn" in name}
    assert kinds == {SlicedAttnProcessor}
    agree(check(subject).accelerated, own)

"""Textual inversion: new words of the text encoder."""

import pytest
import torch
from support import tiny
from support.coexistence import Subject, agree, check, coexists, differ


def load(subject: Subject) -> None:
    vector = torch.randn(1, tiny.WIDTH, generator=torch.Generator().manual_seed(2))
    subject.target.load_textual_inversion({"<thing>": vector}, token="<thing>")


@pytest.mark.slow
@coexists(
    "textual inversion",
    "loaded before and after the patch",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="the word takes effect, with the same result in either order; unloaded, the patch's own pictures",
)
def test_textual_inversion(subject: Subject) -> None:
    prompt = {"prompt": "a <thing>"} | ({"prompt_2": "a cat"} if "Flux" in type(subject.target).__name__ else {})
    own = subject.draw_patched()
    load(subject)
    _, accelerated = check(subject, **prompt)
    differ(accelerated, own)
    subject.target.unload_textual_inversion()
    with subject.patch():
        agree(subject.draw(), own)
        load(subject)
        agree(subject.draw(**prompt), accelerated)

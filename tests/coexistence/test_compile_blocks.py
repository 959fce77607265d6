"""Regional compilation. More in tests/patching/test_compile.py and tests/architectures/test_denoisers.py."""

import pytest
from support.coexistence import Subject, agree, check, coexists, differ

EVERY = {"calibrate_every": 1}
"""Compiled code finds damping and trust in every call."""

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@coexists(
    "`compile_repeated_blocks`",
    "before and after the patch",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="without a graph break, the pictures of the patch that is not compiled; removed, the unpatched ones",
)
def test_compile_repeated_blocks(subject: Subject) -> None:
    exact = subject.draw(num_inference_steps=2)
    with subject.patch(**EVERY):
        own = subject.draw(num_inference_steps=2)
    handle = subject.patch()
    subject.denoiser.compile_repeated_blocks(backend="eager", fullgraph=True)
    agree(subject.draw(num_inference_steps=2), own)
    handle.remove()
    agree(subject.draw(num_inference_steps=2), exact)
    with subject.patch() as handle:
        agree(subject.draw(num_inference_steps=2), own)
        assert handle.report().calls_accelerated > 0
        assert handle.report().calls_passed_through == 0
    differ(own, exact)
    agree(check(subject, num_inference_steps=2).accelerated, own)

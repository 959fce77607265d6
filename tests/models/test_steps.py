"""Progressive width: one step is the plain backbone, several are the published recursion; what cannot be split."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_dit import inputs, run, tiny_dit

from diffattn.models import DiT
from diffattn.models.attention import ATTENTION

STEPS = [[8, 1], [16, 2], [24, 1]]


@pytest.mark.parametrize("attention", ["softmax", "mediator", "mlla"])
def test_one_step_is_the_plain_backbone(attention: str) -> None:
    plain, one = tiny_dit(attention=attention), tiny_dit(attention=attention, steps=[[24, 2]])
    assert plain.state_dict().keys() == one.state_dict().keys()
    assert torch.equal(run(plain, *inputs()), run(one, *inputs()))


def test_each_step_takes_what_the_last_one_made_and_the_channels_that_waited() -> None:
    model: Any = tiny_dit(attention="softmax", steps=STEPS, num_layers=4)
    assert [block.attn.qkv.in_features for block in model.blocks] == [8, 16, 16, 24]
    assert [block.attn.num_heads for block in model.blocks] == [1, 2, 2, 3]
    x, t, y = inputs()
    with torch.no_grad():
        tokens = model.x_embedder(x) + model.pos_embed
        condition = model.t_embedder(t, torch.float32) + model.y_embedder(y)
        first, second = (project(condition) for project in model.step_conditions.values())
        made = model.blocks[0](tokens[..., :8], first, (8, 8), 0)
        made = torch.cat((made, tokens[..., 8:16]), dim=-1)
        made = model.blocks[2](model.blocks[1](made, second, (8, 8), 0), second, (8, 8), 0)
        made = model.blocks[3](torch.cat((made, tokens[..., 16:]), dim=-1), condition, (8, 8), 0)
        patches = model.final_layer(made, condition)
    found = run(model, x, t, y)
    expected = patches.unflatten(2, (2, 2, -1)).unflatten(1, (8, 8)).permute(0, 5, 1, 3, 2, 4).reshape_as(found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", list(ATTENTION))
def test_every_attention_trains_in_steps_on_any_grid(attention: str) -> None:
    model = tiny_dit(attention=attention, steps=STEPS, num_layers=4, num_agents=4).train()
    model.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs(16, 20)).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        idle = ".biases." in name and ".biases.64." not in name
        assert idle or (parameter.grad is not None and parameter.grad.isfinite().all()), name


@pytest.mark.slow
def test_saved_steps_come_back_and_compile(tmp_path: Path) -> None:
    model = tiny_dit(attention=["softmax", "circulant", "mediator", "softmax"], steps=STEPS, num_layers=4)
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert loaded.steps == model.steps
    assert torch.equal(run(loaded, *inputs()), run(model, *inputs()))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, *inputs()), run(model, *inputs()))


@pytest.mark.parametrize(("steps", "message"), [
    ([[8, 1], [16, 3]], r"widths of steps must rise to hidden_size=24.*got \[8, 16\]"),
    ([[24, 2], [24, 2]], r"must rise to hidden_size=24.*got \[24, 24\]"),
    ([[16, 2], [8, 1], [24, 1]], r"must rise to hidden_size=24.*got \[16, 8, 24\]"),
    ([[12, 2], [24, 2]], r"each a multiple of 8 channels per head and of 4, got \[12, 24\]"),
    ([[0, 2], [24, 2]], r"each a multiple of 8 channels.*got \[0, 24\]"),
    ([[8, 1], [24, 2]], r"depths of steps must be at least 1 and add up to num_layers=4, got \[1, 2\]"),
    ([[8, 0], [24, 4]], r"depths of steps must be at least 1.*got \[0, 4\]"),
    ([], r"steps must be pairs of a width and a depth, such as \[\[64, 2\], \[128, 4\]\], got \[\]"),
    ([[24]], r"must be pairs of a width and a depth.*got \[\[24\]\]"),
    ([24, 4], r"must be pairs of a width and a depth.*got \[24, 4\]"),
    ([[8.0, 2], [24, 2]], r"must be pairs of a width and a depth"),
])  # fmt: skip
def test_widths_and_depths_that_cannot_be_are_refused(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dit(steps=steps, num_layers=4)


def test_other_layouts_are_refused() -> None:
    model = tiny_dit(attention="softmax", steps=STEPS, num_layers=4)
    with pytest.raises(ValueError, match="official layout has no place for 3 steps of width"):
        model.to_official()
    with pytest.raises(ValueError, match="DiTTransformer2DModel does not have 3 steps of width"):
        model.to_diffusers()

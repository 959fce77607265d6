"""The models of the benchmarks: published configurations, weights initialised in place, and inputs that fit."""

import pytest
import torch
from torch import nn

from diffattn.architectures import architecture_of
from diffattn.architectures.denoisers import self_attention_layers
from diffattn.measure.denoiser_inputs import make_denoiser_inputs
from diffattn.measure.models import MODELS, PUBLISHED
from diffattn.measure.models.base import Shape, total_memory

TINY = [name for name in MODELS if name not in PUBLISHED]

MILLIONS = {
    "sd15": 859.5,
    "sdxl": 2567.5,
    "sd35m": 2470,  # 4.94 GB of bf16
    "pixart-sigma": 611,  # 2.44 GB of fp32
    "flux": 11_901,  # 23.8 GB of bf16
    "z-image": 6155,  # 12.3 GB of bf16
    "wan-1.3b": 1419,  # 5.68 GB of fp32
    "cogvideox-2b": 1694,  # 3.39 GB of fp16
}
"""Values in the published files of weights, in millions."""

TOKENS = {
    "sd15": [16_384, 4096, 1024, 256],  # at 1024 pixels
    "sdxl": [16_384, 4096, 1024],
    "sd35m": [8100],
    "pixart-sigma": [16_384],
    "flux": [16_384],
    "z-image": [16_384],
    "wan-1.3b": [32_760],
    "cogvideox-2b": [17_550],
}
"""Of the picture or video at the size that the model is measured at."""


def tokens(name: str, model: nn.Module, size: int) -> list[int]:
    grids = architecture_of(model).grids(model, *MODELS[name].latents(size))
    return [int(torch.tensor(grid).prod()) for grid in grids]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_weights_and_tokens_as_published(name: str) -> None:
    row = MODELS[name]
    model = row.build("meta", torch.bfloat16)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}
    values = sum(x.numel() for x in model.state_dict().values()) / 1e6
    assert values == pytest.approx(MILLIONS[name], rel=0.01)
    assert tokens(name, model, 1024 if 1024 in row.sizes else row.sizes[0]) == TOKENS[name]
    assert set(row.levels) <= set(row.attention_levels)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in PUBLISHED.items() if row.fewer])
def test_fewer_layers_are_of_the_same_kinds_in_about_the_same_proportion(name: str) -> None:
    row = MODELS[name]
    every, few = ({**row.config, **fewer} for fewer in ({}, row.fewer))
    share = row.num_layers(few) / row.num_layers(every)
    assert 0 < share < 0.5
    for part in row.depth:
        assert few[part] == pytest.approx(share * every[part], abs=1)
    kinds = [self_attention_layers(row.build("meta", torch.bfloat16, shortened)) for shortened in (False, True)]
    every_shape, few_shape = ({(s.num_heads, s.head_dim, s.context) for s, _ in found} for found in kinds)
    assert few_shape == every_shape
    assert len(kinds[1]) < len(kinds[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_a_tiny_model_is_finite_and_the_same_every_time(name: str, dtype: torch.dtype) -> None:
    row = MODELS[name]

    def run() -> torch.Tensor:
        model = row.build("cpu", dtype)
        args, kwargs = row.inputs(model, row.sizes[0], batch=2)
        with torch.no_grad():
            out = model(*args, **kwargs)[0]
        return torch.stack(list(out))

    out = run()
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert 0.01 < out.float().std() < 100
    assert torch.equal(out, run())


@pytest.mark.parametrize("name", TINY)
def test_models_are_made_in_place_in_the_dtype(name: str) -> None:
    model = MODELS[name].build("cpu", torch.bfloat16)
    floats = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
    assert {x.dtype for x in floats} == {torch.bfloat16}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_there_is_a_tiny_model_of_every_class() -> None:
    assert {MODELS[name].kind for name in TINY} == {row.kind for row in PUBLISHED.values()}


def test_buffers_hold_what_the_class_computes() -> None:
    row = MODELS["tiny-pixart"]
    from diffusers import PixArtTransformer2DModel

    wanted = dict(PixArtTransformer2DModel(**row.config).named_buffers())
    found = dict(row.build("cpu", torch.float32).named_buffers())
    assert wanted.keys() == found.keys() == {"pos_embed.pos_embed"}
    assert torch.equal(found["pos_embed.pos_embed"], wanted["pos_embed.pos_embed"])


def test_shapes_of_pictures_and_videos() -> None:
    assert MODELS["flux"].shape(2048) == Shape(2048, 2048)
    assert str(MODELS["flux"].shape(2048)) == "2048x2048"
    assert str(MODELS["wan-1.3b"].shape(480)) == "832x480x81"
    assert MODELS["wan-1.3b"].latents(480) == Shape(60, 104, 21)
    assert MODELS["cogvideox-2b"].latents(480) == Shape(60, 90, 13)
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 1000"):
        MODELS["flux"].shape(1000)
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 0"):
        MODELS["sd15"].shape(0)


def test_the_depth_is_told() -> None:
    assert MODELS["flux"].depth_text(shortened=False) == "57 layers"
    assert MODELS["flux"].depth_text(shortened=True) == "3 of 57 layers"
    assert MODELS["sd15"].depth_text(shortened=False) is None


@pytest.mark.slow
def test_a_cpu_is_given_fewer_layers_where_the_row_has_them() -> None:
    assert MODELS["flux"].shortened("cpu", torch.bfloat16)
    assert not MODELS["sd15"].shortened("cpu", torch.bfloat16)
    assert not MODELS["flux"].shortened("meta", torch.bfloat16)  # whose memory has no end
    assert total_memory(torch.device("cpu")) > 2**20


def test_inputs_of_an_unknown_class_are_refused() -> None:
    from diffusers import AuraFlowTransformer2DModel

    with torch.device("meta"):
        model = AuraFlowTransformer2DModel(num_mmdit_layers=1, num_single_dit_layers=1)
    with pytest.raises(ValueError, match="no inputs are known for a AuraFlowTransformer2DModel; give the arguments"):
        make_denoiser_inputs(model, 16, 16, 1)

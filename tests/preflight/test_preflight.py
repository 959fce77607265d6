"""The preflight: what it times and counts, the rule of its verdict, and that nothing is left behind. Never how long."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from support import tiny, tiny_dit
from support.commands import call

import diffattn
from diffattn.measure.denoiser_inputs import make_denoiser_inputs
from diffattn.measure.flops import forward_gflops
from diffattn.measure.interleave import Spread
from diffattn.measure.layer_times import LayerTimer, count_layer_gflops, weightless
from diffattn.preflight import Preflight, preflight
from diffattn.preflight.result import RULE, LayerTime, Phase, bound
from diffattn.preflight.run import PreflightRun
from diffattn.sampling import SiTPipeline

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _low_thresholds(tmp_path, monkeypatch):
    """Agents pay from 200 tokens on: at level 0 of the tiny UNet and not at level 1."""
    own = tmp_path / "thresholds.json"
    own.write_text('{"devices": {"cpu": {"64": 200}}}')
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(own))


@pytest.fixture
def pipe(make_pipeline):
    return make_pipeline("sd")


def sit_pipeline(**overrides):
    return SiTPipeline(tiny_dit.tiny_dit(**overrides), FlowMatchEulerDiscreteScheduler(shift=1))


def state(model):
    """Everything that a preflight could leave changed, but the weights."""
    return [
        (
            id(m), type(m), m.training, sorted(m.__dict__), id(getattr(m, "processor", None)), list(m._forward_hooks),
            list(m._forward_pre_hooks), list(m._forward_pre_hooks_with_kwargs), m.__dict__.get("forward"),
        )
        for m in model.modules()
    ]  # fmt: skip


def self_attention_of(unet):
    """By name, without this project's own anatomy."""
    return sorted(name for name, _ in unet.named_modules() if name.endswith(".attn1"))


# What is found.


@pytest.mark.slow
def test_every_self_attention_layer_of_a_unet_is_found(pipe):
    found = preflight(pipe, rounds=2)
    assert sorted(layer.name for layer in found.layers) == self_attention_of(pipe.unet)
    assert {(layer.level, layer.tokens) for layer in found.layers} == {(0, 256), (1, 64)}
    assert (found.height, found.width, found.batch, found.rounds) == (32, 32, 2, 2)
    assert (found.method, found.preset, found.device, found.dtype) == ("agent", "balanced", "cpu", "float32")
    assert found.seconds.median > 0
    assert found.peak_mib is not None
    assert found.peak_mib > 0
    assert found.weights_mib == pytest.approx(sum(p.numel() for p in pipe.unet.parameters()) * 4 / 2**20)


@pytest.mark.slow
def test_shares_are_shares(pipe):
    found: Any = preflight(pipe, rounds=3)
    assert found.rounds == 3
    for layer in found.layers:
        for low, high in ((layer.core_share, layer.share), (layer.share, found.share)):
            assert 0 < low.median <= high.median < 1
            assert 0 < low.q25 <= low.median <= low.q75 <= 1
        assert layer.seconds.median > 0
    assert 0 < found.covered_share.median < found.core_share.median < found.share.median < 1
    assert 1 < found.covered_bound < found.core_bound < found.bound


@pytest.mark.slow
def test_what_the_preset_is_said_to_cover_is_what_a_run_accelerates(pipe):
    found = preflight(pipe, rounds=1)
    with diffattn.patch(pipe, preset="balanced") as patch:
        tiny.run(pipe)
        ran = {layer.name: layer for layer in patch.report().layers if layer.accelerated}
        exact = {layer.name: layer.passed_through for layer in patch.report().layers if layer.passed_through}
    assert {layer.name for layer in found.covered} == set(ran)
    assert {layer.name for layer in found.layers if layer.level == 0} == set(ran)
    assert {layer.name: {layer.why_exact} for layer in found.layers if layer.why_exact} == {
        name: set(reasons) for name, reasons in exact.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "phases"),
    [
        ("balanced", (Phase(0.0, 3),)),
        ("pooled", (Phase(0.4, 3), Phase(0.0, 0))),
    ],
)
def test_phases_of_a_preset(pipe, preset, phases):
    found = preflight(pipe, preset=preset, rounds=1)
    assert found.phases == phases
    assert len(found.covered) == 3


@pytest.mark.slow
def test_larger_pictures_have_more_tokens_and_the_size_need_not_be_square(pipe):
    found = preflight(pipe, 64, 48, rounds=1)
    assert (found.height, found.width) == (64, 48)
    assert {layer.tokens for layer in found.layers} == {32 * 24, 16 * 12}


@pytest.mark.slow
def test_sdxl(make_pipeline):
    pipe = make_pipeline("sdxl")
    found = preflight(pipe, rounds=1)
    assert sorted(layer.name for layer in found.layers) == self_attention_of(pipe.unet)
    assert {layer.level for layer in found.layers} == {1, 2}


@pytest.mark.slow
def test_a_controlnet_by_itself():
    net = tiny.controlnet()
    found = preflight(net, 16, 16, rounds=1)
    assert sorted(layer.name for layer in found.layers) == self_attention_of(net)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["softmax", "mediator"])
def test_every_layer_of_a_sit_is_found(attention):
    pipe = sit_pipeline(attention=attention)
    found = preflight(pipe, rounds=2)
    assert [layer.name for layer in found.layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert {layer.tokens for layer in found.layers} == {64}
    assert found.method == {"softmax": "agent", "mediator": "mediator"}[attention]
    assert len(found.covered) == {"softmax": 0, "mediator": 2}[attention]
    assert (found.time_ratio is None) == (attention == "softmax")
    assert all(0 < layer.core_share.median < layer.share.median < 1 for layer in found.layers)
    assert preflight(pipe, batch=1, rounds=1).gflops == pytest.approx(forward_gflops(pipe.transformer))


@pytest.mark.slow
def test_any_dtype(pipe):
    found = preflight(pipe.to(torch.bfloat16), rounds=1)
    assert found.dtype == "bfloat16"
    assert len(found.layers) == 7


@pytest.mark.slow
def test_a_time_budget_keeps_one_round(pipe):
    rounds = []
    found = preflight(pipe, rounds=50, time_budget=1e-9, on_round=lambda: rounds.append(1))
    assert found.rounds == len(rounds) == 1


# How it is measured.


def test_hooks_are_on_self_attention_and_its_projections_only():
    unet = tiny.unet()
    layers = PreflightRun(unet).modules
    timer = LayerTimer(layers, CPU)
    with timer:
        hooked = {name for name, m in unet.named_modules() if m._forward_hooks}
        assert hooked == {name for name, m in unet.named_modules() if m._forward_pre_hooks}
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    assert hooked == {*layers, *(f"{name}.{part}" for name in layers for part in projections)}
    assert not any("attn2" in name for name in hooked)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_the_timer_adds_up_projections_and_calls():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    timer = LayerTimer({"a": layer, "never called": torch.nn.Linear(2, 2)}, CPU)
    x = torch.randn(8, 64)
    with timer:
        layer(x)
    with timer:
        layer(layer(x))
    assert len(timer.calls) == 2
    for timed in timer.calls:
        assert 0 < timed["a"].projections < timed["a"].whole
        assert timed["a"].core == timed["a"].whole - timed["a"].projections
        assert timed["never called"].whole == 0


@pytest.mark.slow
def test_gflops_of_a_layer_are_those_of_its_formula():
    unet: Any = tiny.unet()
    names = self_attention_of(unet)
    args, kwargs = make_denoiser_inputs(unet, 16, 16, batch=3)
    counted: Any = count_layer_gflops(unet, names, args, kwargs)
    for name in names:
        channels = unet.get_submodule(name).to_q.in_features
        tokens = {16: 256, 32: 64}[channels]
        assert counted.layers[name] * 1e9 == 3 * (8 * tokens * channels**2 + 4 * tokens**2 * channels)
    assert sum(counted.layers.values()) < counted.total


def test_a_weightless_copy_has_no_weights_and_leaves_the_model_its_own():
    unet = tiny.unet()
    before = [id(p) for p in unet.parameters()]
    twin = weightless(unet)
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    assert [id(p) for p in unet.parameters()] == before
    assert {p.device.type for p in unet.parameters()} == {"cpu"}


# Nothing is left behind.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "sit"])
def test_the_pipeline_is_bit_for_bit_what_it_was(pipe, kind):
    pipe = pipe if kind == "unet" else sit_pipeline()
    model = pipe.unet if kind == "unet" else pipe.transformer
    args, kwargs = make_denoiser_inputs(model, 16, 16, batch=2)

    def output():
        with torch.no_grad():
            out = model(*args, **kwargs)
        return out[0]

    exact, before = output(), state(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    scheduler, random = dict(pipe.scheduler.__dict__), torch.get_rng_state()
    preflight(pipe, rounds=2)
    assert state(model) == before
    assert {name: id(part) for name, part in pipe.components.items()} == {
        name: id(getattr(pipe, name)) for name in pipe.components
    }
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert pipe.scheduler.__dict__.keys() == scheduler.keys()
    assert all(pipe.scheduler.__dict__[name] is value for name, value in scheduler.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(output(), exact)


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_behind(pipe):
    before = state(pipe.unet)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preflight(pipe, on_round=interrupt)
    assert state(pipe.unet) == before


def test_a_failing_call_leaves_nothing_behind(pipe):
    before = state(pipe.unet)
    args, kwargs = make_denoiser_inputs(pipe.unet, 16, 16, batch=2)
    bad = {**kwargs, "encoder_hidden_states": torch.zeros(2, 3, 5)}
    with pytest.raises(RuntimeError):
        preflight(pipe, inputs=(args, bad))
    assert state(pipe.unet) == before
    timer = LayerTimer(PreflightRun(pipe).modules, CPU)
    with pytest.raises(RuntimeError), timer:
        pipe.unet(*args, **bad)
    assert state(pipe.unet) == before


# The verdict, on constructed numbers.


def spread(median, width=0.01):
    return Spread(median, median - width, median + width)


def made(why_exact=None, covered_share=0.4, ratio: float | None = 0.7):
    layer = LayerTime("a", 0, 4096, spread(0.5), spread(0.5), spread(0.4), 1.5, why_exact)
    return Preflight(
        model="UNet2DConditionModel", height=512, width=512, batch=2, device="cpu", dtype="float32", method="agent",
        preset="balanced", rounds=5, seconds=spread(1.0), share=spread(0.5), core_share=spread(0.4),
        covered_share=spread(covered_share), time_ratio=None if ratio is None else spread(ratio),
        layers=(layer, replace(layer, name="b", level=1, tokens=64, why_exact="64 tokens: too few")),
        phases=(Phase(0.0, 1),), gflops=4.0, peak_mib=None, weights_mib=12.0, machine={"cpu": "x", "threads": 1},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "worth_it", "told"),
    [
        ({}, True, "Worth patching here: 1.43x"),
        ({"covered_share": 0.1}, True, "at most 1.11x"),
        ({"covered_share": 0.099}, False, "attention takes 9.9% of a call in the 1 of 2 layers"),
        ({"ratio": 0.98}, True, "Worth patching here: 1.02x"),
        ({"ratio": 0.995}, False, "not clearly faster, 1.01x (middle half 1.00x to 1.02x)"),
        ({"ratio": 1.2}, False, "not clearly faster, 0.83x"),
        ({"why_exact": "300 tokens: exact is faster below 400", "ratio": None, "covered_share": 0.0}, False,
         "accelerates none of the 2 self-attention layers (300 tokens: exact is faster below 400); no method could be "
         "more than 2.00x as fast"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_rule(values, worth_it, told):
    found = made(**values)
    assert found.worth_it is worth_it
    assert found.verdict.startswith("Worth" if worth_it else "Not worth")
    assert told in found.verdict
    assert "10%" in RULE


def test_bounds():
    found = made()
    assert found.bound == 2.0
    assert found.core_bound == found.covered_bound == pytest.approx(1 / 0.6)
    assert bound(0) == 1
    assert bound(1.0) is None
    assert found.attention_gflops == 3.0
    assert replace(found, layers=(replace(found.layers[0], gflops=None),)).attention_gflops is None


@pytest.mark.slow
def test_json_round_trip(pipe):
    for found in (made(), made(why_exact="x", ratio=None), preflight(pipe, rounds=2)):
        data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert Preflight.from_dict(data) == found
        assert data["verdict"] == found.verdict
        assert data["rule"] == RULE
        assert data["bound"] == pytest.approx(1 / (1 - data["share"]["median"]))


def test_the_tables():
    found = made()
    text = str(found)
    for part in ("accelerated", "exact: 64 tokens: too few", "50.0%", "4096", "noise level 0 up: 1 layers", "GFLOPs"):
        assert part in text
    head, *rows = found.group_rows()
    assert [dict(zip(head, row, strict=True))["layers"] for row in rows] == ["1", "1"]
    alike = replace(found, layers=(found.layers[0], replace(found.layers[0], name="c")))
    (_, row) = alike.group_rows()
    assert row[:6] == ("2", "0", "4096", "500", "100.0%", "80.0%")


# Bad input.


def test_sizes_that_do_not_fit(pipe):
    with pytest.raises(ValueError, match="height 33 is not a positive multiple of 8 pixels; nearest: 32 or 40"):
        preflight(pipe, 33, 32)
    with pytest.raises(ValueError, match="width 0 is not a positive multiple"):
        preflight(pipe, 32, 0)
    with pytest.raises(ValueError, match="got 0x16"):
        preflight(pipe.unet, 0, 16)
    with pytest.raises(ValueError, match="height 17"):
        preflight(sit_pipeline(), 17, 16)
    with pytest.raises(ValueError, match="ControlNetModel has no size of its own"):
        preflight(tiny.controlnet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"batch": 0}, "batch must be 1 or more, got 0"),
        ({"method": "nothing"}, "unknown method: 'nothing'; allowed: agent"),
        ({"preset": "nothing"}, "'nothing'; allowed: balanced"),
        ({"method": "mediator"}, "nothing to patch in UNet2DConditionModel: 7 x softmax attention"),
    ],
)
def test_bad_options(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        preflight(pipe, **options)


def test_a_model_without_self_attention():
    plain: Any = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    with pytest.raises(ValueError, match="nothing to patch in UNet2DConditionModel: it has no self-attention layer"):
        preflight(tiny.unet(**plain))


def test_other_models():
    with pytest.raises(TypeError, match="Linear is not supported; supported: UNet2DConditionModel"):
        preflight(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        preflight("emoji-sd")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_patched_or_compiled_model_is_refused(pipe):
    with diffattn.patch(pipe), pytest.raises(ValueError, match="already patched; call diffattn"):
        preflight(pipe)
    compiled = tiny.unet()
    compiled.compile()
    with pytest.raises(ValueError, match="is compiled"):
        preflight(compiled)
    with pytest.raises(ValueError, match="is compiled"):
        preflight(torch.compile(tiny.unet()))  # type: ignore[arg-type]


@pytest.mark.slow
def test_unknown_conditions_need_inputs_which_may_be_given():
    unet = tiny.unet(class_embed_type="timestep")
    with pytest.raises(ValueError, match="class_embed_type='timestep'; give the arguments of one call as `inputs`"):
        preflight(unet)
    args, kwargs = make_denoiser_inputs(tiny.unet(), 16, 16, batch=2)
    found = preflight(unet, inputs=(args, {**kwargs, "class_labels": torch.tensor([1, 2])}), rounds=1)
    assert len(found.layers) == 7


@pytest.mark.slow
def test_class_labels_of_a_unet():
    unet: UNet2DConditionModel = tiny.unet(num_class_embeds=3)
    assert len(preflight(unet, rounds=1).layers) == 7


# The command.


@pytest.mark.slow
def test_the_command(tmp_path):
    file = tmp_path / "x.json"
    found = call("info", "--model", "emoji-sd", "--size", "128x64", "--rounds", 2, "--json", file)
    assert found.exit_code == 0, found.output
    data = json.loads(file.read_text())
    assert data["asked_for"] == "emoji-sd"
    again = Preflight.from_dict(data)
    assert (again.height, again.width, again.rounds) == (128, 64, 2)
    assert found.stdout.rstrip().endswith(again.verdict)
    assert "self-attention in one denoiser call" in found.stdout
    assert "embedded models" not in found.stdout
    by_layer = call("info", "--model", "emoji-sd", "--size", 64, "--rounds", 1, "--layers")
    assert by_layer.exit_code == 0, by_layer.output
    assert all(layer.name in by_layer.stdout for layer in again.layers)
    assert "64x64" in by_layer.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--model emoji-sd --size 100", "width 100 is not a positive multiple of 8 pixels; nearest: 96 or 104"),
        ("--model emoji-sd --size big", "HxW or N, such as 512x768 or 512, got 'big'"),
        ("--model emoji-sd --size 64x", "got '64x'"),
        ("--model emoji-sd --size 64 --device tpu", "device 'tpu' is not available here; allowed: auto"),
        ("--model emoji-sd --size 64 --dtype float8", "float32, float16, bfloat16"),
        ("--model emoji-sd --size 64 --rounds 0", "rounds must be 1 or more"),
        ("--model emoji-sd --size 64 --time-budget 0", "--time-budget must be above 0"),
        ("--model emoji-sd --size 64 --method mediator", "nothing to patch"),
        ("--model nothing --size 64", "nothing"),
        ("--size 64", "--size '64' applies to a model: give --model too"),
        ("--preset fast", "--preset 'fast' applies to a model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, named):
    found = call("info", *words.split())
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    (told,) = found.stderr.strip().splitlines()
    assert told.startswith("diffattn: ")
    assert named in told


@pytest.mark.slow
def test_an_offloaded_denoiser_is_measured_where_it_computes() -> None:
    """As `enable_sequential_cpu_offload` leaves it: weights on "meta" between calls, loaded layer by layer."""
    unet = tiny.unet()
    cpu_offload(unet, CPU)
    assert next(unet.parameters()).is_meta
    found = preflight(unet, 16, 16, rounds=2)
    assert found.device == "cpu"
    assert found.covered_share.median > 0

"""The steps of a run: layers in the network's order with their tokens, and the run stored beside a model."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import web

from diffattn.app.jobs import RunTrace
from diffattn.app.jobs.run_trace import in_order
from diffattn.app.jobs.stored_steps import FILE, read_steps, write_steps


def test_layers_are_in_the_order_in_which_a_network_runs_them() -> None:
    names = ["down_blocks.0.a", "down_blocks.1.a", "up_blocks.0.a", "up_blocks.1.a", "mid_block.a"]
    assert in_order(names) == ["down_blocks.0.a", "down_blocks.1.a", "mid_block.a", "up_blocks.0.a", "up_blocks.1.a"]
    both = [*names, "controlnet.down_blocks.0.a", "controlnet.mid_block.a"]
    assert in_order(both) == [*in_order(names), *both[-2:]]
    assert in_order(["blocks.0", "blocks.10", "blocks.2"]) == ["blocks.0", "blocks.10", "blocks.2"]


@pytest.mark.slow
def test_a_trace_has_the_layers_in_their_order_with_their_tokens(tmp_path: Path) -> None:
    worker = web.tiny_worker(web.save_models(tmp_path / "models", side=64))
    list(worker.generate("a", web.ask(worker)))
    order: list[str] = []
    unet: Any = web.loaded(worker).unet
    names = {f"{name}.attn1" for name, module in unet.named_modules() if hasattr(module, "attn1")}
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in unet.named_modules()
        if name in names
    ]
    drawn: Any = list(worker.generate("a", web.ask(worker, steps=1, acceleration="agent/fast")))[-1]
    for handle in handles:
        handle.remove()
    trace = drawn.trace
    assert [name.removesuffix(".processor") for name in trace.layers] == order
    assert max(filter(None, trace.tokens)) == 32 * 32  # the latents of 64 pixels; the VAE halves them
    assert len(trace.tokens) == len(trace.layers)


@pytest.mark.slow
def test_stored_steps_come_back_and_those_with_a_switch_are_preferred(tmp_path: Path) -> None:
    folder = web.save_sits(tmp_path / "models", "a", "b")
    worker = web.tiny_worker(folder)
    for name, way in (("a", "none"), ("b", "mediator/balanced")):
        drawn: Any = list(worker.generate("x", web.ask(worker, model=name, prompt="1", steps=8, acceleration=way)))[-1]
        write_steps(drawn.trace, f"{name}, {way}", folder / name)
    found = worker.stored_steps()
    assert found is not None
    assert found.switches
    own = read_steps(folder / "b")
    assert own is not None
    assert own.title == "b, mediator/balanced"
    assert own.numbers == drawn.trace.numbers
    assert read_steps(tmp_path) is None
    assert read_steps(None) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("numbers"), lambda d: d.update(seconds=[]), lambda d: d.update(tokens=[]),
        lambda d: d["numbers"].__setitem__(0, "<b>"), lambda d: d.update(title=3), lambda d: d.update(changes=None),
        lambda d: d["accelerated"].__setitem__(0, []), lambda d: d["seconds"].__setitem__(0, float("nan")),
        lambda d: d.update(layers=[3] * len(d["layers"])),
    ],
)  # fmt: skip
def test_damaged_steps_are_refused_in_words_and_skipped(
    tmp_path: Path, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trace = RunTrace("x", ["a"], [4], [[True]], [4], [1.0], [None], [0.1])
    folder = web.save_sits(tmp_path / "models", "sit") / "sit"
    write_steps(trace, "x", folder)
    data = json.loads((folder / FILE).read_text())
    change(data)
    (folder / FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"'sit/{FILE}' contains no steps") as refused:
        read_steps(folder)
    assert str(tmp_path) not in str(refused.value)
    web.tiny_worker(tmp_path / "models").stored_steps()
    assert "sit: " in caplog.text

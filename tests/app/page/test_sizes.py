"""The sizes that are offered for models of any size, and the advice about small ones."""

# ruff: noqa: E402, the page needs Gradio

from pathlib import Path

import pytest
from support import web

web.need_gradio()

from diffattn.app.page.sizes import OWN_SIZE, size_value, sizes, small_gain


@pytest.mark.parametrize(
    ("own", "most", "offered"),
    [
        (64, 1024, ["128x128", "512x512"]),
        (256, 1024, ["384x384", "512x512"]),
        (256, 400, ["384x384"]),
        (512, 1024, ["768x768"]),
        (512, 512, []),
        (512, 256, []),
    ],
)
def test_the_models_own_size_comes_first_and_larger_ones_follow(
    tmp_path: Path, own: int, most: int, offered: list[str]
) -> None:
    worker = web.tiny_worker(web.save_models(tmp_path / "models", side=own), side=most)
    found = sizes(worker, "one")
    assert found[0] == (f"{own}×{own} (the model's own)", OWN_SIZE)
    assert [value for _, value in found[1:]] == offered
    for _, value in found[1:]:
        side = int(value.partition("x")[0])
        assert size_value(worker, "one", side, side) == value
    assert size_value(worker, "one", own, own) == OWN_SIZE


@pytest.mark.parametrize(
    ("own", "most", "side", "advised"),
    [
        (256, 1024, 256, True), (256, 1024, 512, False), (256, 400, 256, False),
        (512, 1024, 256, True), (512, 1024, 512, False), (512, 512, 384, True),
    ],
)  # fmt: skip
def test_a_larger_picture_is_advised_where_one_can_be_drawn(
    tmp_path: Path, own: int, most: int, side: int, advised: bool
) -> None:
    worker = web.tiny_worker(web.save_models(tmp_path / "models", side=own), side=most)
    assert bool(small_gain(worker, "one", side, side)) == advised

"""Speed and FID in a real browser: measured, stopped, kept over a reload, and seen by their visitor alone."""

# ruff: noqa: E402, the page needs Gradio, the browser Playwright

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import web

web.need_gradio()
web.need_chromium()

from playwright.sync_api import Page, Route, expect
from support.browsing import (
    PATIENCE,
    Site,
    choose,
    go_to,
    open_settings,
    says,
    set_number,
    set_steps,
    site_of,
    tab_of,
)

from diffattn.drawing.loading import embedded_models

Visit = Callable[[], Page]
STORED = len(embedded_models())
"""Runs that every page has at start, one of each embedded model; none compares with another."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    models = web.save_sits(tmp_path_factory.mktemp("browser") / "models", "sit")
    with site_of(models, {"tab": "Speed and FID", "model": None}, samples=64) as found:
        yield found


def prepare(page: Page) -> None:
    """Ask for little."""
    panel = tab_of(page)
    panel.get_by_label("Models", exact=True).first.press("Backspace")
    choose(page, "Models", "sit")
    panel.get_by_label("Accelerations", exact=True).first.press("Backspace")
    panel.get_by_label("Accelerations", exact=True).first.press("Backspace")
    panel.get_by_label("Numbers of agents or mediators").fill("4, 16")
    set_number(page, "N: pictures of each", 8)
    set_steps(page, 2)
    open_settings(page, "Features")
    choose(page, "Features", "cifar-classifier")


def measured(page: Page) -> str:
    """The name of a new run."""
    page.click("#measure")
    says(page, "#measure-stage", "Done: ")
    return page.locator("#measure-stage").inner_text().strip().removeprefix("Done: ").rstrip(".")


def test_a_small_run_measures_speed_and_fid(visit: Visit) -> None:
    page = visit()
    panel = tab_of(page)
    prepare(page)
    expect(page.locator("#measure-time")).to_contain_text("32 pictures", timeout=PATIENCE)
    page.click("#measure")
    expect(page.locator("#measure-stage")).to_contain_text("Done", timeout=2 * PATIENCE)
    expect(page.locator("#results svg.diffattn-panel")).to_have_count(2 * STORED + 2)
    expect(page.locator("#results table").last.get_by_role("cell", name="mediator n=16")).to_be_visible()
    expect(panel.locator(".file-preview")).to_contain_text(".csv", timeout=PATIENCE)
    panel.get_by_label("GFLOPs per picture").check()
    expect(page.locator("#results svg.diffattn-panel").first).to_contain_text("GFLOPs", timeout=PATIENCE)
    boxes = page.locator("#runs").get_by_role("checkbox")
    expect(boxes).to_have_count(STORED + 1)
    for box in boxes.all():
        box.uncheck()
    expect(page.locator("#results")).to_contain_text("No run is chosen", timeout=PATIENCE)


def test_runs_survive_a_reload_and_belong_to_their_visitor(visit: Visit) -> None:
    one, two = visit(), visit()
    prepare(one)
    title = measured(one)
    one.wait_for_function("localStorage.getItem('diffattn-runs')?.length > 1000")
    assert title not in two.content()
    assert tab_of(two).get_by_label("Numbers of agents or mediators").input_value() == ""
    one.reload()
    go_to(one, "Speed and FID")
    says(one, "#runs", title)
    expect(one.locator("#results svg.diffattn-panel")).to_have_count(2 * STORED + 2)
    two.reload()
    go_to(two, "Speed and FID")
    expect(two.locator("#runs").get_by_role("checkbox")).to_have_count(STORED)
    assert title not in two.content()


def test_what_a_browser_sends_as_its_runs_is_checked(visit: Visit) -> None:
    page, sent = visit(), []
    prepare(page)
    title = measured(page)
    page.wait_for_function("localStorage.getItem('diffattn-runs')?.length > 1000")

    def spoil(route: Route) -> None:
        data: Any = json.loads(route.request.post_data or "{}")
        runs = next((x for x in data["data"] if isinstance(x, list) and x and isinstance(x[0], dict)), None)
        if runs:
            runs[:0] = [None, 3, {"title": "<script>"}, runs[0] | {"lines": "x"}]
            sent.append(runs)
        route.continue_(post_data=json.dumps(data))

    page.route("**/gradio_api/run/predict*", spoil)
    page.reload()
    go_to(page, "Speed and FID")
    says(page, "#runs", title)
    assert sent
    expect(page.locator("#runs").get_by_role("checkbox")).to_have_count(STORED + 1)
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


def test_stop_ends_a_measurement(visit: Visit) -> None:
    page = visit()
    prepare(page)
    set_steps(page, 900)
    set_number(page, "N: pictures of each", 64)
    page.click("#measure")
    says(page, "#measure-stage", "step ")
    page.click("#stop-measure")
    says(page, "#measure-stage", "Stopped: the run under way was dropped")
    set_steps(page, 2)
    set_number(page, "N: pictures of each", 8)
    measured(page)

"""The page in a real browser, over a tiny model."""

# ruff: noqa: E402, the page needs Gradio, the browser Playwright

from collections.abc import Iterator
from typing import Any

import pytest
from support import web

web.need_gradio()
web.need_chromium()

from playwright.sync_api import Page, expect
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
    start_a_long_job,
    tab_of,
    visitors,
)

from diffattn.app.jobs import Limits, Worker
from diffattn.app.page import launch

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_of(web.save_models(tmp_path_factory.mktemp("browser") / "models")) as found:
        yield found


def test_ctrl_enter_generates_and_the_steps_are_shown(visit: Any) -> None:
    page = visit()
    page.get_by_label("Prompt").first.fill("a dog")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#stage")).to_contain_text("Done", timeout=PATIENCE)
    expect(page.locator("#gallery img").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator(".cm-content").first).to_contain_text("'a dog'", timeout=PATIENCE)
    go_to(page, "Time steps")
    expect(page.locator("#steps-chart svg")).to_be_visible(timeout=PATIENCE)


def test_bad_input_is_a_toast_that_says_what_to_do(visit: Any) -> None:
    page = visit()
    choose(page, "Model", "../../etc")
    page.click("#generate")
    expect(page.get_by_test_id("toast-body")).to_contain_text("is not available here; choose one of", timeout=PATIENCE)
    says(page, "#stage", "Please change this: model '../../etc' is not available here")  # when the toast is gone
    assert "Traceback" not in page.content()


def test_two_visitors_see_their_own(visit: Any) -> None:
    one, two = visit(), visit()
    one.get_by_label("Prompt").first.fill("only for one")
    one.click("#generate")
    expect(one.locator("#stage")).to_contain_text("Done", timeout=PATIENCE)
    expect(two.locator("#stage")).to_contain_text("Measured earlier")
    assert two.locator("#gallery img").count() == 0
    assert "only for one" not in two.content()
    assert two.get_by_label("Prompt").first.input_value() == "T-Rex"
    go_to(two, "Time steps")
    expect(two.locator("#steps-chart")).to_contain_text("Draw something")


def click_until(page: Page, button: str, text: str) -> None:
    """Click again while the page still takes the last click's run as under way, as a person would."""
    for _ in range(60):
        page.click(button)
        page.wait_for_timeout(1000)
        if text in page.locator("#stage").inner_text():
            return
    raise AssertionError(f"no {text!r}: {page.locator('#stage').inner_text()}")


def test_stop_ends_a_run_whose_preview_is_shown(visit: Any) -> None:
    page = visit()
    start_a_long_job(page)
    expect(page.locator("#stage img")).to_be_visible(timeout=PATIENCE)
    page.click("#stop")
    expect(page.locator("#stage")).to_contain_text("Stopped", timeout=PATIENCE)
    page.wait_for_timeout(1500)
    expect(page.locator("#stage")).to_contain_text("Stopped")  # no step came after it
    expect(page.locator("#gallery img")).to_have_count(0)
    set_number(page, "Pictures", 1)
    set_steps(page, 3)
    page.click("#generate")
    expect(page.locator("#stage")).to_contain_text("Done", timeout=PATIENCE)


def test_a_visitor_who_waits_sees_the_place_in_line_and_can_leave(visit: Any) -> None:
    first, second = visit(), visit()
    start_a_long_job(first)
    second.click("#generate")
    expect(second.locator("#stage")).to_contain_text("Waiting: 1 job runs before yours", timeout=PATIENCE)
    second.click("#stop")
    expect(second.locator("#stage")).to_contain_text("Stopped", timeout=PATIENCE)
    expect(first.locator("#stage")).to_contain_text("step ")
    click_until(second, "#generate", "Waiting")  # once more, after it left
    first.click("#stop")
    expect(second.locator("#stage")).to_contain_text("Done", timeout=PATIENCE)


def test_closing_the_tab_stops_its_job(visit: Any) -> None:
    gone, other = visit(), visit()
    start_a_long_job(gone)
    gone.close()
    other.click("#generate")
    says(other, "#stage", "Done")


def test_the_seed_is_kept_or_renewed_and_thrown_anew(visit: Any) -> None:
    page = visit()
    seed, keep = page.get_by_label("Seed", exact=True).first, page.get_by_label("Keep the seed").first
    page.click("#generate")
    says(page, "#stage", "Done")
    page.wait_for_timeout(500)
    assert seed.input_value() == "0"
    page.get_by_role("button", name="New seed").click()
    expect(seed).not_to_have_value("0")
    thrown = seed.input_value()
    keep.uncheck()
    page.click("#generate")
    expect(seed).not_to_have_value(thrown, timeout=PATIENCE)
    expect(page.locator(".cm-content").first).to_contain_text(f"manual_seed({thrown})", timeout=PATIENCE)


def test_settings_that_are_looked_at_but_left_empty_are_the_models_own(visit: Any) -> None:
    page = visit()
    code = page.locator(".cm-content").first
    page.click("#generate")
    expect(code).to_contain_text("width=32", timeout=PATIENCE)
    before = code.inner_text()
    open_settings(page, "Width")
    set_number(page, "Pictures", 2)
    page.click("#generate")
    says(page, "#stage", "2 of 2 pictures")
    assert code.inner_text() == before


def test_the_time_is_told_once_the_model_has_drawn(visit: Any) -> None:
    page = visit()
    choose(page, "Model", "group/two")
    expect(tab_of(page)).to_contain_text("Time: known after the first run of this kind and size", timeout=PATIENCE)
    page.click("#generate")
    expect(tab_of(page)).to_contain_text("Time: about", timeout=PATIENCE)


def test_the_first_picture_of_the_embedded_model_comes_with_one_click(site: Site) -> None:
    page_of_all, address = launch(Worker(limits=Limits(steps=4), device="cpu"), wait=False)
    try:
        with visitors(site.browser, address) as opened:
            page = opened()
            says(page, "#generate", "Generate")
            page.click("#generate")
            expect(page.locator("#gallery img").first).to_be_visible(timeout=PATIENCE)
            says(page, "#stage", "Done")
    finally:
        page_of_all.close()


def test_a_narrow_window_has_no_sideways_scroll_in_any_tab(visit: Any) -> None:
    page = visit(width=390)
    page.click("#generate")
    expect(page.locator("#stage")).to_contain_text("Done", timeout=PATIENCE)
    for tab, button in (("Generate", "#generate"), ("Compare", "#compare"), ("Speed and FID", "#measure"),
                        ("Time steps", "#steps-chart svg")):  # fmt: skip
        go_to(page, tab)
        expect(page.locator(button)).to_be_visible(timeout=PATIENCE)
        if tab == "Compare":
            choose(page, "Model", "one")
            set_steps(page, 2)
            page.click(button)
            expect(page.locator("#compare-stage")).to_contain_text("Done", timeout=PATIENCE)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab


def test_in_dark_mode_text_is_light_on_dark(visit: Any) -> None:
    page = visit(scheme="dark")
    assert brightness(page, "getComputedStyle(document.body).backgroundColor") < 80
    go_to(page, "Time steps")
    assert brightness(page, "getComputedStyle(document.querySelector('#steps-chart p')).color") > 180


def brightness(page: Page, colour: str) -> float:
    red, green, blue = page.evaluate(f"{colour}.match(/[\\d.]+/g).slice(0, 3).map(Number)")
    return (red + green + blue) / 3


def test_nothing_is_fetched_from_elsewhere(site: Site) -> None:
    context, asked = site.browser.new_context(), []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.address)
    page.wait_for_selector("#generate", timeout=PATIENCE)
    context.close()
    assert [url for url in asked if not url.startswith((site.address, "data:", "blob:"))] == []

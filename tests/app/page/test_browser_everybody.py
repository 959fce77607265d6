"""Accessibility in a real browser: both themes, keyboard, phone; and texts of any content."""

# ruff: noqa: E402, the page needs Gradio, the browser Playwright

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support import web

web.need_gradio()
web.need_chromium()

from playwright.sync_api import Page, expect
from support.accessible import problems
from support.browsing import PATIENCE, Site, choose, go_to, says, set_steps, site_of, start_a_long_job, tab_of

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing

UNFOLD = """document.querySelectorAll("button.label-wrap:not(.open)").forEach((b) => b.offsetParent && b.click())"""
TABS = ("Generate", "Compare", "Speed and FID", "Time steps")
MARKUP = "<input autofocus onfocus=window.hacked=1>"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With a model whose name and classes are markup."""
    models = web.save_models(tmp_path_factory.mktemp("browser") / "models")
    index = web.save_sits(models, MARKUP) / MARKUP / "model_index.json"
    classes = {str(i): f"{MARKUP}{i}" for i in range(5)}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": classes}))
    with site_of(models) as found:
        yield found


def draw_and_compare(page: Page) -> None:
    page.click("#generate")
    says(page, "#stage", "Done")
    go_to(page, "Compare")
    set_steps(page, 2)
    page.click("#compare")
    says(page, "#compare-stage", "Done")
    expect(page.locator("#slider img")).to_have_count(2, timeout=PATIENCE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(visit: Any, scheme: str) -> None:
    page = visit(scheme=scheme)
    found = {"first": problems(page)}
    draw_and_compare(page)
    for tab in TABS:
        go_to(page, tab)
        page.evaluate(UNFOLD)
        page.wait_for_timeout(500)
        found[tab] = problems(page)
    lines = [f"{tab}: {line}" for tab, of_tab in found.items() for line in of_tab]
    assert not lines, "\n".join(lines)


def test_the_keyboard_moves_the_slider(visit: Any) -> None:
    page = visit()
    slider = page.locator("#first input[type=range]")
    slider.focus()
    before = page.locator("#first .diffattn-slider").evaluate("e => getComputedStyle(e).getPropertyValue('--at')")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    after = page.locator("#first .diffattn-slider").evaluate("e => getComputedStyle(e).getPropertyValue('--at')")
    assert (before, after) == ("50%", "55%")


@pytest.mark.parametrize("width", [390, 320])
def test_every_tab_can_be_reached_on_a_phone(visit: Any, width: int) -> None:
    page = visit(width=width)
    if width == 390:
        for tab in TABS:
            expect(page.get_by_role("tab", name=tab)).to_be_visible()
    for tab in reversed(TABS):
        go_to(page, tab)  # from the menu of those for which there is no room
    assert problems(page) == []


def test_a_phone_has_the_button_and_the_result_below_the_prompt(visit: Any) -> None:
    page = visit(width=390)
    for tab, button, result in (
        ("Generate", "#generate", "#stage"), ("Compare", "#compare", "#compare-stage"),
        ("Speed and FID", "#measure", "#measure-stage"), ("Time steps", None, None),
    ):  # fmt: skip
        go_to(page, tab)
        if button is None or result is None:
            continue
        fold(page)
        panel = tab_of(page)
        settings = panel.locator(".diffattn-settings")
        top = [panel.locator(place).bounding_box()["y"] for place in (button, result)]
        assert [*top, settings.bounding_box()["y"]] == sorted([*top, settings.bounding_box()["y"]]), tab
        assert settings.bounding_box()["height"] < 80, tab  # folded
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
    go_to(page, "Generate")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.evaluate("document.querySelector('#generate').click()")
    says(page, "#stage", "Done")
    page.wait_for_function("Math.abs(document.querySelector('.diffattn-result').getBoundingClientRect().top) < 300")


def fold(page: Page) -> None:
    """Fold the settings if the choice of a model has opened them."""
    page.wait_for_timeout(1000)
    opened = tab_of(page).locator(".diffattn-settings > button.open")
    if opened.count():
        assert page.locator("#generate").is_visible()  # the page has folded those of the other tabs
        opened.first.click()
    page.wait_for_timeout(500)


def test_names_and_prompts_are_shown_as_text_whatever_they_hold(visit: Any) -> None:
    page = visit()
    page.get_by_label("Prompt").first.fill(MARKUP)
    draw_and_compare(page)
    go_to(page, "Generate")
    choose(page, "Model", MARKUP)
    says(page, "[role=tabpanel]:visible .diffattn-line >> nth=0", "Time")
    page.get_by_label("Prompt").first.fill(MARKUP)  # no class of it
    page.click("#generate")
    says(page, "#stage", "unknown class name")
    page.get_by_label("Prompt").first.fill(f"{MARKUP}3")
    page.click("#generate")
    says(page, "#stage", "Done")
    for tab in TABS:
        go_to(page, tab)
        page.wait_for_timeout(500)
    assert page.locator("input[autofocus]").count() == 0
    assert page.evaluate("window.hacked") is None


def test_stop_is_there_while_something_runs_and_stops_its_own_tab_alone(visit: Any) -> None:
    page = visit()
    for tab, stop in zip(TABS, ("#stop", "#stop-compare", "#stop-measure"), strict=False):
        go_to(page, tab)
        expect(page.locator(stop)).to_be_hidden()
    go_to(page, "Generate")
    start_a_long_job(page)
    expect(page.locator("#stop")).to_be_visible()
    go_to(page, "Compare")
    set_steps(page, 2)
    page.click("#compare")
    says(page, "#compare-stage", "Waiting: 1 job runs before yours")
    page.click("#stop-compare")
    says(page, "#compare-stage", "Stopped")
    go_to(page, "Generate")
    says(page, "#stage", "step ")
    page.click("#stop")
    says(page, "#stage", "Stopped")


def test_prompt_model_and_seed_are_those_of_speed_and_fid_too(visit: Any) -> None:
    page = visit()
    page.get_by_label("Prompt").first.fill("for all")
    page.get_by_label("Seed", exact=True).first.fill("7")
    go_to(page, "Speed and FID")
    panel = tab_of(page)
    expect(panel.get_by_label("First seed").first).to_have_value("7", timeout=PATIENCE)
    expect(panel.locator(".token")).to_contain_text(["one"])
    panel.get_by_label("the prompt of the other tabs").check()
    expect(panel.get_by_label("List of prompts").first).to_have_value("for all", timeout=PATIENCE)
    panel.get_by_label("First seed").first.fill("9")
    go_to(page, "Generate")
    expect(tab_of(page).get_by_label("Seed", exact=True).first).to_have_value("9", timeout=PATIENCE)
    tab_of(page).get_by_label("Prompt").first.fill("another")
    go_to(page, "Speed and FID")
    expect(panel.get_by_label("List of prompts").first).to_have_value("another", timeout=PATIENCE)


def test_settings_of_every_tab_are_there_after_a_reload(visit: Any) -> None:
    page = visit()
    for tab in ("Compare", "Speed and FID"):
        go_to(page, tab)
        set_steps(page, 11)
    page.wait_for_timeout(1000)
    page.reload()
    for tab in ("Compare", "Speed and FID"):
        go_to(page, tab)
        expect(tab_of(page).get_by_label("number input for Steps").first).to_have_value("11", timeout=PATIENCE)

"""The page in a real browser, over a tiny model."""

# ruff: noqa: E402, the page needs Gradio, the browser Playwright

from collections.abc import Iterator
from typing import Any

import pytest
import web

web.need_gradio()
web.need_chromium()

from playwright.sync_api import Browser, Page, expect, sync_playwright

PATIENCE = 60_000

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = web.save_models(tmp_path_factory.mktemp("browser") / "models")
    with web.served(web.tiny_worker(models)) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=web.CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Any]:
    """Opens the page as another visitor, with the tiny model chosen."""
    contexts = []

    def opened(width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        choose(page, "Model", "one")
        set_steps(page, 3)
        return page

    yield opened
    for context in contexts:
        context.close()


def tab_of(page: Page) -> Any:
    return page.get_by_role("tabpanel").filter(visible=True)


def choose(page: Page, label: str, value: str) -> None:
    field = tab_of(page).get_by_label(label, exact=True).first
    field.fill(value)
    field.press("Enter")


def set_steps(page: Page, steps: int) -> None:
    field = tab_of(page).get_by_label("number input for Steps").first
    field.fill(str(steps))
    field.press("Tab")


def test_ctrl_enter_generates_and_the_steps_are_shown(visit: Any) -> None:
    page = visit()
    page.get_by_label("Prompt").first.fill("a dog")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#stage")).to_contain_text("Done", timeout=PATIENCE)
    expect(page.locator("#gallery img").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator(".cm-content").first).to_contain_text("'a dog'", timeout=PATIENCE)
    page.get_by_role("tab", name="Time steps").click()
    expect(page.locator("#steps-chart svg")).to_be_visible(timeout=PATIENCE)


def test_compare_shows_a_slider_and_figures(visit: Any) -> None:
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    choose(page, "Model", "one")
    set_steps(page, 2)
    page.click("#compare")
    expect(page.locator("#compare-stage")).to_contain_text("Done", timeout=PATIENCE)
    expect(page.locator("#slider img")).to_have_count(2, timeout=PATIENCE)
    expect(page.get_by_role("cell", name="agent/balanced")).to_be_visible()
    first = page.locator("#slider img").last.get_attribute("src")
    page.get_by_label("agent/fast", exact=True).check()
    expect(page.locator("#slider img").last).not_to_have_attribute("src", first or "", timeout=PATIENCE)


def test_bad_input_is_a_toast_that_says_what_to_do(visit: Any) -> None:
    page = visit()
    choose(page, "Model", "../../etc")
    page.click("#generate")
    expect(page.get_by_test_id("toast-body")).to_contain_text("is not available here; choose one of", timeout=PATIENCE)
    assert "Traceback" not in page.content()


def test_two_visitors_see_their_own(visit: Any) -> None:
    one, two = visit(), visit()
    one.get_by_label("Prompt").first.fill("only for one")
    one.click("#generate")
    expect(one.locator("#stage")).to_contain_text("Done", timeout=PATIENCE)
    expect(two.locator("#stage")).to_contain_text("The picture appears here")
    assert two.locator("#gallery img").count() == 0
    assert "only for one" not in two.content()
    two.get_by_role("tab", name="Time steps").click()
    expect(two.locator("#steps-chart")).to_contain_text("Draw something")


def test_a_narrow_window_has_no_sideways_scroll(visit: Any) -> None:
    page = visit(width=390)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    expect(page.locator("#generate")).to_be_visible()


def test_nothing_is_fetched_from_elsewhere(browser: Browser, address: str) -> None:
    context, asked = browser.new_context(), []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#generate", timeout=PATIENCE)
    context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []

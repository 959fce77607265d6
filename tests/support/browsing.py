"""Visitors of the page in a real Chromium, and what they do with it; only for modules that need Chromium."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from support import web

PATIENCE = 60_000


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=web.CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def visitors(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """A function that opens the page as another visitor, in a tab."""
    contexts = []

    def opened(tab: str = "Generate", width: int = 1280, scheme: Any = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        if width <= 768:  # the page folds its settings once it is there
            page.locator(".diffattn-settings > button:not(.open)").first.wait_for()
        if tab != "Generate":
            go_to(page, tab)
        return page

    yield opened
    for context in contexts:
        context.close()


@dataclass(frozen=True)
class Site:
    """A page that is served, the browser to open it in, and where its visitors begin."""

    browser: Browser
    address: str
    tab: str = "Generate"
    model: str | None = "one"
    steps: int = 3

    @contextmanager
    def visitors(self) -> Iterator[Callable[..., Page]]:
        """A function that opens the page as another visitor, with the model and few steps chosen."""
        with visitors(self.browser, self.address) as opened:

            def visit(**view: Any) -> Page:
                page = opened(self.tab, **view)
                if self.model is not None:
                    choose(page, "Model", self.model)
                    set_steps(page, self.steps)
                return page

            yield visit


@contextmanager
def site_of(folder: Path, begin: dict[str, Any] | None = None, **limits: int) -> Iterator[Site]:
    """The page over the models of a folder, whose jobs may be long enough to be stopped.

    Args:
        folder: of models, see `web.save_models`.
        begin: fields of `Site` for its visitors.
        limits: other ones than those for long jobs.
    """
    worker = web.tiny_worker(folder, **({"steps": 900, "images": 50, "calls": 10**6} | limits))
    with web.served(worker) as address, chromium() as browser:
        yield Site(browser, address, **(begin or {}))


def tab_of(page: Page) -> Any:
    return page.get_by_role("tabpanel").filter(visible=True)


def go_to(page: Page, tab: str) -> None:
    """Open a tab, which a narrow window has in a menu."""
    expect(tab_of(page)).to_be_visible(timeout=PATIENCE)  # the page is there
    button = page.get_by_role("tab", name=tab)
    if not button.is_visible():
        page.locator(".overflow-menu button").first.click()
        button = page.locator(".overflow-dropdown").get_by_text(tab, exact=True)
    button.click()
    expect(tab_of(page)).to_be_visible()


def unfold(page: Page) -> None:
    """Open the settings, which a narrow window has folded away."""
    page.wait_for_timeout(300)
    folded = tab_of(page).locator(".diffattn-settings > button:not(.open)")
    if folded.count():
        folded.first.click()


def choose(page: Page, label: str, value: str) -> None:
    unfold(page)
    field = tab_of(page).get_by_label(label, exact=True).first
    field.fill(value)
    field.press("Enter")


def set_number(page: Page, label: str, value: int) -> None:
    unfold(page)
    field = tab_of(page).get_by_label(f"number input for {label}").first
    field.fill(str(value))
    field.press("Tab")


def set_steps(page: Page, steps: int) -> None:
    set_number(page, "Steps", steps)


def says(page: Page, place: str, text: str) -> None:
    """Wait until it does."""
    expect(page.locator(place)).to_contain_text(text, timeout=PATIENCE)


def open_settings(page: Page, inside: str) -> None:
    """Open "More settings", until what is inside is seen: a page that is moved by a picture may miss a click."""
    field = tab_of(page).get_by_label(inside).first
    for _ in range(10):
        if field.is_visible():
            return
        tab_of(page).get_by_role("button", name="More settings").click()
        page.wait_for_timeout(2000)
    expect(field).to_be_visible()


def start_a_long_job(page: Page, button: str = "#generate", stage: str = "#stage") -> None:
    set_steps(page, 900)
    set_number(page, "Pictures", 50)
    page.click(button)
    says(page, stage, "step ")

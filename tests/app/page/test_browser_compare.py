"""Comparisons, and the steps of their variants, in a real browser."""

# ruff: noqa: E402, the page needs Gradio, the browser Playwright

from collections.abc import Callable, Iterator
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
    says,
    set_number,
    set_steps,
    site_of,
    start_a_long_job,
)

Visit = Callable[[], Page]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    models = web.save_models(tmp_path_factory.mktemp("browser") / "models", side=64)
    with site_of(models, {"tab": "Compare", "steps": 2}) as found:
        yield found


def test_a_slider_figures_and_the_steps_of_every_variant(visit: Visit) -> None:
    page = visit()
    page.click("#compare")
    says(page, "#compare-stage", "Done")
    expect(page.locator("#slider img")).to_have_count(2, timeout=PATIENCE)
    expect(page.get_by_role("cell", name="Balanced", exact=True)).to_be_visible()
    first = page.locator("#slider img").last.get_attribute("src")
    page.get_by_label("Fast, seed 0", exact=True).check()
    expect(page.locator("#slider img").last).not_to_have_attribute("src", first or "", timeout=PATIENCE)
    go_to(page, "Time steps")
    expect(page.locator("#steps-chart svg")).to_have_attribute("aria-label", "What the steps of agent/balanced did")
    choose(page, "Run", "Compare: Exact (no acceleration)")
    expect(page.locator("#steps-chart svg")).to_have_attribute("aria-label", "What the steps of none did")
    says(page, "#steps-chart", "every step ran exact attention")


def test_the_time_counts_exact_attention_every_acceleration_and_the_recipe(visit: Visit) -> None:
    page = visit()
    says(page, "#compare-time", "for 9 pictures")  # three of each
    set_number(page, "Pictures", 2)
    says(page, "#compare-time", "for 6 pictures")
    page.get_by_role("button", name="More settings").filter(visible=True).click()
    recipe: Any = {"name": "recipe.json", "mimeType": "application/json", "buffer": b'{"method": "agent"}'}
    page.locator("input[type=file]:visible, [role=tabpanel]:visible input[type=file]").first.set_input_files([recipe])
    says(page, "#compare-time", "for 8 pictures")


def test_stop_ends_a_comparison(visit: Visit) -> None:
    page = visit()
    start_a_long_job(page, "#compare", "#compare-stage")
    page.click("#stop-compare")
    says(page, "#compare-stage", "Stopped. Change something and press Compare again")  # the job's last word, not Stop's
    set_steps(page, 2)
    set_number(page, "Pictures", 1)
    page.click("#compare")
    says(page, "#compare-stage", "Done")
    expect(page.locator("#verdict")).to_contain_text("no firm figure from so few pictures")

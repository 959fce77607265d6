"""A visitor's pictures and settings survive errors, Stop and a reload, in a real browser."""

# ruff: noqa: E402, the page needs Gradio, the browser Playwright

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import web

web.need_gradio()
web.need_chromium()

from playwright.sync_api import Locator, Page, TimeoutError, expect
from support.browsing import (
    PATIENCE,
    Site,
    go_to,
    open_settings,
    says,
    set_number,
    set_steps,
    site_of,
    start_a_long_job,
    tab_of,
)

from diffattn.drawing.request import record_of

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_of(web.save_models(tmp_path_factory.mktemp("browser") / "models"), prompt=1000) as found:
        yield found


def draw(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").first.fill(prompt)
    page.click("#generate")
    says(page, "#gallery", prompt)
    says(page, "#stage", "Done")


def test_an_error_is_a_toast_and_keeps_the_picture(visit: Any) -> None:
    page = visit()
    draw(page, "a dog")
    picture = page.locator("#gallery img").first.get_attribute("src")
    for label, value, said in (("Width", "33", "multiple of 8"), ("Width", "4", "width must be")):
        open_settings(page, label)
        field = tab_of(page).get_by_label(label).first
        field.fill(value)
        field.press("Tab")
        page.click("#generate")
        expect(page.get_by_test_id("toast-body").last).to_contain_text(said, timeout=PATIENCE)
        says(page, "#stage", said)
        expect(page.locator("#gallery img").first).to_have_attribute("src", picture or "")
        assert (
            page.locator("[data-testid=status-tracker] span.error").filter(visible=True).count() == 0
        )  # Gradio's red "Error" over an output


def test_stop_keeps_the_picture_that_was_there(visit: Any) -> None:
    page = visit()
    draw(page, "a dog")
    picture = page.locator("#gallery img").first.get_attribute("src")
    expect(page.locator("#stop")).to_be_hidden()
    start_a_long_job(page)
    expect(page.locator("#gallery")).to_be_hidden()  # the preview takes its place
    page.click("#stop")
    says(page, "#stage", "Stopped")
    expect(page.locator("#gallery img").first).to_have_attribute("src", picture or "")
    expect(page.locator("#stop")).to_be_hidden()


def test_earlier_pictures_come_back_with_their_settings(visit: Any) -> None:
    page = visit()
    draw(page, "a dog")
    expect(page.locator("#history")).to_be_hidden()  # nothing is earlier
    draw(page, "a cat")
    expect(page.locator("#history img")).to_have_count(2, timeout=PATIENCE)
    page.locator("#history img").last.click()
    says(page, "#stage", "Shown again, with its settings: a dog, seed 0")
    says(page, "#gallery", "a dog")
    expect(page.get_by_label("Prompt").first).to_have_value("a dog")
    expect(page.locator(".cm-content").first).to_contain_text("'a dog'")


def test_settings_are_there_after_a_reload(visit: Any) -> None:
    page = visit()
    page.get_by_label("Prompt").first.fill("only mine")
    set_number(page, "Pictures", 2)
    page.wait_for_timeout(1000)
    page.reload()
    expect(page.get_by_label("Prompt").first).to_have_value("only mine", timeout=PATIENCE)
    expect(tab_of(page).get_by_label("number input for Steps").first).to_have_value("3")
    expect(tab_of(page).get_by_label("number input for Pictures").first).to_have_value("2")
    expect(tab_of(page).get_by_label("Model", exact=True).first).to_have_value("one")


def download(page: Page, link: Locator, path: Path) -> None:
    """Save what a link downloads; a click on one that Gradio is just replacing is lost, so click again."""
    for left in (2, 1, 0):
        try:
            with page.expect_download(timeout=20_000) as found:
                link.click()
        except TimeoutError:
            if not left:
                raise
        else:
            found.value.save_as(path)
            return


def test_a_picture_that_is_dropped_restores_its_settings(visit: Any, tmp_path: Path) -> None:
    page = visit()
    set_steps(page, 4)
    draw(page, "a dog")
    download(page, page.locator(".diffattn-after a[download]").first, tmp_path / "dog.png")
    assert record_of(tmp_path / "dog.png")["prompt"] == "a dog"
    other = visit()
    other.locator("#drop input[type=file]").set_input_files(tmp_path / "dog.png")
    says(other, "#stage", "Settings of dog.png restored")
    expect(other.get_by_label("Prompt").first).to_have_value("a dog")
    expect(tab_of(other).get_by_label("number input for Steps").first).to_have_value("4")
    expect(tab_of(other).get_by_label("Acceleration", exact=True).first).to_have_value("Balanced")
    (tmp_path / "empty.png").write_bytes(b"no picture")
    other.locator("#drop input[type=file]").set_input_files(tmp_path / "empty.png")
    expect(other.get_by_test_id("toast-body").last).to_contain_text("is not a picture", timeout=PATIENCE)


def test_a_prompt_that_is_cut_says_so(visit: Any) -> None:
    page = visit()
    draw(page, "word " * 100 + "unread")
    says(page, "#stage", "The prompt was cut")
    draw(page, "short")
    expect(page.locator("#stage")).not_to_contain_text("cut")


def test_prompt_model_and_seed_are_those_of_both_tabs(visit: Any) -> None:
    page = visit()
    page.get_by_label("Prompt").first.fill("for both")
    page.get_by_label("Seed", exact=True).first.fill("7")
    go_to(page, "Compare")
    panel = tab_of(page)
    expect(panel.get_by_label("Prompt").first).to_have_value("for both", timeout=PATIENCE)
    expect(panel.get_by_label("Seed", exact=True).first).to_have_value("7")
    expect(panel.get_by_label("Model", exact=True).first).to_have_value("one")
    panel.get_by_label("Prompt").first.fill("and back")
    go_to(page, "Generate")
    expect(tab_of(page).get_by_label("Prompt").first).to_have_value("and back", timeout=PATIENCE)
    tab_of(page).get_by_text("tent", exact=True).click()
    go_to(page, "Compare")
    expect(tab_of(page).get_by_label("Prompt").first).to_have_value("tent", timeout=PATIENCE)


def test_a_picture_is_compared_with_one_click(visit: Any) -> None:
    page = visit()
    draw(page, "a dog")
    page.get_by_label("Prompt").first.fill("something else")
    page.click("#compare-this")
    says(page, "#compare-stage", "Done")
    expect(page.locator("#slider img")).to_have_count(2, timeout=PATIENCE)
    expect(tab_of(page).get_by_label("Prompt").first).to_have_value("a dog")


def test_of_several_pictures_the_one_that_was_opened_is_compared(visit: Any) -> None:
    page = visit()
    set_number(page, "Pictures", 2)
    page.click("#generate")
    says(page, "#stage", "2 of 2 pictures")
    page.locator("#gallery img").nth(1).click()
    page.click("#compare-this")
    says(page, "#compare-stage", "Done")
    expect(tab_of(page).get_by_label("Seed", exact=True).first).to_have_value("1")

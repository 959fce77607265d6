"""Pictures of the page, every tab after a run of the embedded model, for the README.

    python pipelines/screenshot_page.py --out samples/webui

Needs Playwright (pip install 'diffattn[dev]') and Chromium (apt-get install chromium).
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from playwright.sync_api import Page, expect, sync_playwright

from diffattn.app.jobs import Worker
from diffattn.app.page import launch

SECONDS = 600
TABS = {
    "generate": ("Generate", "#generate", "#stage", "Done"),
    "compare": ("Compare", "#compare", "#compare-stage", "Done"),
    "quality": ("Speed and FID", "#measure", "#measure-stage", "Done"),
    "steps": ("Time steps", None, "#steps-chart", "step"),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    tabs: Annotated[str, typer.Option(help="Which, with commas.")] = "generate,quality",
    dark: Annotated[bool, typer.Option("--dark", help="In dark colours.")] = False,
    width: Annotated[int, typer.Option(help="Of the window, in pixels.")] = 1280,
) -> None:
    """Serve the page, use it, and take a picture of each tab."""
    out.mkdir(parents=True, exist_ok=True)
    served, address = launch(Worker(device="cpu"), wait=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        page.set_default_timeout(1000 * SECONDS)
        page.goto(address)
        for name in tabs.split(","):
            _run(page, *TABS[name])
            page.screenshot(path=out / f"{name}.png", full_page=True)
            typer.echo(out / f"{name}.png")
        browser.close()
    served.close()


def _run(page: Page, tab: str, button: str | None, stage: str, done: str) -> None:
    """Press the tab's button and wait for its results."""
    page.get_by_role("tab", name=tab).click()
    if tab == "Speed and FID":
        samples = page.get_by_label("number input for N: pictures of each").filter(visible=True).first
        samples.fill("8")
        samples.press("Tab")
    if button:
        page.click(button)
    expect(page.locator(stage)).to_contain_text(done, timeout=1000 * SECONDS)
    page.wait_for_timeout(2000)  # pictures and files arrive
    page.evaluate("window.scrollTo(0, 0)")


if __name__ == "__main__":
    typer.run(main)

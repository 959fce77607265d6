"""What keeps a page from being read, as axe-core finds it; only for modules that need Chromium."""

from typing import Any

from axe_playwright_python.sync_playwright import Axe

GRADIO = "image-redundant-alt"
"""A rule (of axe's good practices) that Gradio's gallery breaks: the caption of a picture is its alternative text."""


def problems(page: Any) -> list[str]:
    """One line for everything that is wrong with what is shown."""
    found = Axe().run(page, options={"resultTypes": ["violations"], "rules": {GRADIO: {"enabled": False}}}).response
    return [
        f"{rule['id']} ({rule['impact']}): {node['html'][:200]} {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]

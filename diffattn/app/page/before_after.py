"""Two pictures under one slider, which the mouse, a finger and the arrow keys move."""

from html import escape
from pathlib import Path
from urllib.parse import quote

import gradio as gr

WORDS = ("Exact", "Accelerated")


def slider(before: str, after: str, description: str, words: tuple[str, str] = WORDS) -> str:
    """The HTML of a slider.

    Args:
        before, after: addresses of the pictures, of one size.
        description: what both show.
        words: what each is.
    """
    what = escape(description, quote=True)
    left, right = (escape(word, quote=True) for word in words)
    move = "this.parentElement.style.setProperty('--at', this.value + '%')"
    return (
        '<div class="diffattn-slider" style="--at:50%">'
        f'<img src="{escape(before, quote=True)}" alt="{left}: {what}">'
        f'<img class="after" src="{escape(after, quote=True)}" alt="{right}: {what}">'
        f'<span class="left">{left}</span><span class="right">{right}</span><i></i>'
        f'<input type="range" min="0" max="100" value="50" aria-label="Left of the line: {left}. Right: {right}" '
        f'oninput="{move}"></div>'
    )


def address(path: str | Path) -> str:
    """The address, relative to the page's, of a file that the page serves."""
    return f"gradio_api/file={quote(str(path))}"


def shown_pair(pair: tuple[str, str] | None, label: str) -> gr.HTML:
    """A slider over two files, or none."""
    if not pair:
        return gr.HTML("", visible=False)
    return gr.HTML(slider(address(pair[0]), address(pair[1]), label, ("Exact", label)), visible=True)

"""Draws the pictures of a request."""

from typing import Any

import numpy as np

from diffattn.drawing.draw import generate, prepare
from diffattn.drawing.request import Request


def draw(pipe: Any, asked: Request) -> list[np.ndarray]:
    """The pictures; the pipeline is left unpatched."""
    ready, patch = prepare(pipe, asked)
    try:
        return [np.asarray(picture.image) for picture in generate(pipe, ready)]
    finally:
        if patch:
            patch.remove()

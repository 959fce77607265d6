"""What a visitor sees before the first click: a stored comparison under the slider, with its figures."""

import base64
import logging
from html import escape
from pathlib import Path

from diffattn.app.jobs import Worker
from diffattn.app.jobs.first_view import FirstView
from diffattn.app.jobs.suited import own_method, plain_name
from diffattn.app.page.before_after import slider
from diffattn.app.page.compare_figures import card
from diffattn.app.page.sizes import LARGE, own_sizes

log = logging.getLogger("diffattn.app.page")


def first_view(worker: Worker) -> str:
    """The HTML of the first stored comparison of the models offered; empty if there is none."""
    for name in worker.models.names():
        place = worker.models.place(name)
        try:
            view = FirstView.read(place)
        except ValueError as error:
            log.warning("%s: %s", name, error)
            continue
        if view is not None:
            return shown(view, plain_name(view.acceleration, own_method(place)), worker.models.describe(name).size)
    return ""


def shown(view: FirstView, name: str, own: tuple[int, int] | None) -> str:
    """The HTML of a stored comparison.

    Args:
        name: of the acceleration, in plain words.
        own: size that the model was trained at, the only one at which the PSNR is shown; None: not known.
    """
    both = slider(_inline(view.exact), _inline(view.accelerated), view.prompt, ("Exact", name))
    psnr = view.psnr if own in (None, view.size) else None
    figures = f'<div class="diffattn-verdict">{card(name, view.speedup, psnr)}</div>'
    what = (
        f"“{view.prompt}”, {view.model} at {own_sizes(view.size)} pixels, {view.steps} steps; {view.speedup.pairs} "
        f"pictures of each, drawn in turns, with the 95 % interval; {view.machine}."
    )
    small = " Small picture, small gain: in larger ones attention takes more of the time." * (max(view.size) < LARGE)
    return f'{figures}{both}<p class="diffattn-small">{escape(what + small)}</p>'


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"

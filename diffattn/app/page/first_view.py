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
            own = worker.models.describe(name).size
            return _html(view, plain_name(view.acceleration, own_method(place)), own in (None, view.size))
    return ""


def _html(view: FirstView, name: str, at_own_size: bool) -> str:
    """The PSNR is told at the size alone that the model was trained at."""
    both = slider(_inline(view.exact), _inline(view.accelerated), view.prompt, ("Exact", name))
    figures = f'<div class="diffattn-verdict">{card(name, view.speedup, view.psnr if at_own_size else None)}</div>'
    what = (
        f"“{view.prompt}”, {view.model} at {own_sizes(view.size)} pixels, {view.steps} steps; {view.speedup.pairs} "
        f"pictures of each, drawn in turns, with the 95 % interval; {view.machine}."
    )
    small = " Small picture, small gain: attention takes more of the time in larger ones." * (max(view.size) < LARGE)
    return f'{figures}{both}<p class="diffattn-small">{escape(what + small)}</p>'


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"

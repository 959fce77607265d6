"""The verdict and the figures of a comparison."""

import math
from html import escape

from diffattn.app.jobs import Comparison, Variant
from diffattn.app.jobs.speed_up import LEAST, SpeedUp
from diffattn.app.jobs.suited import plain_name
from diffattn.app.page.shared import UNCOUNTED, note, table
from diffattn.app.page.sizes import own_sizes

HEAD = (
    "acceleration",
    "s per picture",
    "speed-up (95 % interval)",
    "GFLOPs per picture",
    "peak MiB (GPU)",
    "PSNR dB",
    "SSIM",
    "layers",
)

BLANKED = "{} pictures were blanked by the model's safety checker; their pairs count for neither PSNR nor SSIM."
UNMEASURED = "Peak memory is measured on CUDA devices only."
TOO_FEW = f"draw at least {LEAST}"

Size = tuple[int, int] | None


def headline(found: Comparison, own: str | None, size: Size) -> str:
    """The result of the comparison in large type: one figure per acceleration."""
    cards = "".join(_card(found, variant, own, size) for variant in found.variants[1:])
    return f'<div class="diffattn-verdict">{cards}</div>'


def _card(found: Comparison, v: Variant, own: str | None, size: Size) -> str:
    return card(plain_name(v.name, own), found.speedup(v), v.psnr if _at_own_size(found, size) else None)


def card(name: str, faster: SpeedUp | None, psnr: float | None) -> str:
    """Name, speed-up and similarity of one acceleration."""
    if faster is None:
        large, small = "–", f"no firm figure from so few pictures: {TOO_FEW}"
    elif not faster.shown:
        large, small = "no difference shown", f"interval {faster.low:.2f}–{faster.high:.2f}×"
    elif faster.value > 1:
        large, small = f"{faster.value:.2f}× faster", f"interval {faster.low:.2f}–{faster.high:.2f}×"
    else:
        large, small = f"{1 / faster.value:.2f}× slower", f"interval {1 / faster.high:.2f}–{1 / faster.low:.2f}×"
    alike = "" if psnr is None else "identical pictures" if math.isinf(psnr) else f"PSNR {psnr:.1f} dB"
    return (
        f'<div class="diffattn-card"><span>{escape(name)}</span><strong>{escape(large)}</strong>'
        f"<span>{escape(small)}</span><strong>{escape(alike)}</strong></div>"
    )


def figures(found: Comparison, own: str | None, size: Size) -> str:
    """The table, and below it an explanation of its figures."""
    rows, at_own = [], _at_own_size(found, size)
    for v in found.variants:
        faster = None if v is found.variants[0] else found.speedup(v)
        db = "–" if v.psnr is None or not at_own else "identical" if math.isinf(v.psnr) else f"{v.psnr:.1f}"
        layers = f"{v.report.layers_accelerated} of {v.report.layers_patched} accelerated" if v.report else "exact"
        ratio = "1" if v is found.variants[0] else TOO_FEW if faster is None else str(faster)
        rows.append(
            (plain_name(v.name, own), f"{v.seconds:.2f}", ratio, _or_dash(v.gflops, ".1f"),
             _or_dash(v.peak_mib, ".0f"), db, _or_dash(v.ssim if at_own else None, ".3f"), layers)
        )  # fmt: skip
    return table(HEAD, rows) + "".join(map(note, _notes(found, at_own, size)))


def _notes(found: Comparison, at_own: bool, size: Size) -> list[str]:
    count = found.request.num_images
    few = f"single times vary, so a speed-up is given from {LEAST} pictures on"
    turns = f"{count} pictures of each, drawn in turns; the interval is Student's, over the pictures"
    said = [f"Times: {few}." if count < LEAST else f"Times: {turns}."]
    blanked = sum(v.blanked for v in found.variants)
    said += [BLANKED.format(blanked)] * bool(blanked)
    if not at_own and size is not None:
        said.append(f"PSNR and SSIM are only shown at the size that the model was trained at, {own_sizes(size)}.")
    said += [UNMEASURED] * (found.variants[0].peak_mib is None)
    return said + [UNCOUNTED] * any(v.gflops is None for v in found.variants)


def reports(found: Comparison, own: str | None) -> str:
    """What ran in which layer, for every acceleration."""
    head, parts = ("layer", "tokens", "calls accelerated", "calls exact", "why exact"), []
    for v in found.variants:
        if v.report:
            rows = [
                (x.name, str(x.tokens or "–"), str(x.accelerated), str(sum(x.passed_through.values())), x.note)
                for x in v.report.layers
                if x.left_alone != "cross-attention"
            ]
            parts.append(note(plain_name(v.name, own)) + table(head, rows))
    return "".join(parts)


def _at_own_size(found: Comparison, size: Size) -> bool:
    """Whether the pictures have the size that the model was trained at, or none is known."""
    drawn = found.variants[0].pictures[0].image.size
    return size is None or drawn == size


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)

"""Charts and their verdicts."""

# ruff: noqa: E402, the page needs Gradio

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from support import web

web.need_gradio()

from diffattn.app.jobs import QualityRun, RunTrace
from diffattn.app.jobs.quality_run import Line
from diffattn.app.page.charts import steps_chart
from diffattn.app.page.quality_charts import APART, NO_BAND, TIME, results, verdict
from diffattn.app.page.scale import Scale
from diffattn.app.page.shared import in_words
from diffattn.evaluation.quality import Protocol, QualityResult
from diffattn.measure.interleave import Spread

PROTOCOL = Protocol(
    num_pictures=16, reference="r", reference_hash="", reference_pictures=None, extractor="e", extractor_hash="",
    resize="", sampler="s", steps=20, guidance=1.0, seeds="0..15", dtype="float32", device="cpu",
)  # fmt: skip


def line(name: str, seconds: float, fid: float, **changes: Any) -> Line:
    scores = {"fid": fid, "fid_std": 2.0, "kid": fid / 100, "kid_std": 0.02}
    quality = QualityResult(name, PROTOCOL, scores)
    return replace(Line(name, quality, Spread(seconds, seconds, seconds), 1 / seconds, None), **changes)


def run(*lines: Line, title: str = "mine", model: str = "m") -> QualityRun:
    return QualityRun(title, model, ("a",), {"cpu": "c", "threads": 1}, lines)


RUN = run(
    line("none", 1.0, 60.0),
    line("agent/balanced", 0.8, 61.0, span=(1.1, 1.4)),
    line("agent/fast", 0.5, 70.0, span=(0.9, 3.0)),
)


def test_the_verdict_is_one_sentence_and_calls_chance_by_its_name() -> None:
    said = verdict(RUN)
    assert said.count(".") - len(re.findall(r"\d\.\d", said)) == 1
    assert "Balanced 1.25× as fast, FID and KID as exact's, within chance" in said
    assert "Fast shows no difference in speed (0.90–3.00×), FID worse by 10, KID worse by 0.1" in said
    same = verdict(run(RUN.lines[0], RUN.lines[1], line("mediator/fast", 0.5, 60.5)))
    assert same.endswith("Fast (mediator) 2.00× as fast; in all, FID and KID as exact's, within chance.")
    assert verdict(run(RUN.lines[0])) == ""


def test_points_have_names_that_do_not_overlap() -> None:
    close = run(*(line(f"agent n={n}", 1.0 + n / 1000, 60 + n / 100) for n in range(1, 6)))
    svg = results([close], TIME).split("</svg>")[0]
    names = re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*font-size="11">(agent n=\d)</text>', svg)
    assert {name for _, name in names} == {f"agent n={n}" for n in range(1, 6)}
    heights = sorted(float(y) for y, _ in names)
    assert all(b - a >= APART - 0.11 for a, b in pairwise(heights))


def test_a_band_of_exact_attention_shows_what_chance_does() -> None:
    svgs = results([RUN], TIME).split("</svg>")[:2]
    assert ["plus and minus a standard deviation" in svg for svg in svgs] == [True, True]
    assert NO_BAND not in results([RUN], TIME)
    before = {"fid": 1.0, "kid": 1.0, "kid_std": 0.1}  # of an older file
    bare = run(*(replace(x, quality=replace(x.quality, scores=before)) for x in RUN.lines))
    assert NO_BAND in results([bare], TIME)
    assert "FID" not in verdict(bare)


def test_what_cannot_be_compared_is_told_in_words() -> None:
    other = replace(PROTOCOL, num_pictures=8)
    few = replace(RUN.lines[0], quality=replace(RUN.lines[0].quality, protocol=other))
    html = results([RUN, run(few, title="few", model="another")], TIME)
    assert "Not comparable with the runs above: other model, other N." in html


def test_names_are_escaped_and_cut() -> None:
    hostile = "<img src=x onerror=alert(1)>" * 40
    html = results([run(line(hostile, 1.0, 60.0), title=hostile, model=hostile)], TIME)
    assert "<img" not in html
    assert "&lt;img" in html
    assert "<img" not in steps_chart(RunTrace(hostile, [hostile], [4], [[True]], [4], [1.0], [None], [0.1]))


def test_the_axis_begins_at_zero_where_zero_is_shown() -> None:
    scale = Scale([0.0, 60.0, 60.1], 0, 100)
    assert scale.low == 0
    assert scale(60.1) - scale(60.0) < 1
    assert scale.ticks()[0] == 0
    assert len(Scale([0.0, 7.0], 0, 100, most=3).ticks()) <= 4


def test_steps_have_ticks_and_layers_their_tokens() -> None:
    calls = 8
    trace = RunTrace(
        "x", ["down_blocks.0.attentions.0", "mid_block.a"], [4096, None], [[True, False]] * calls, [4, 4, 4, *[16] * 5],
        [None] * calls, [None, *[0.5] * (calls - 1)], [0.1] * calls,
    )  # fmt: skip
    svg = steps_chart(trace)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"0", "4", "16", "4,096", "–", "tokens", "1", "8"} <= set(texts)
    assert svg.count('class="switch"') == 1
    assert trace.switches == [3]


@pytest.mark.parametrize("long", ["x" * 900, "a word " * 150])
def test_long_values_are_cut_in_messages(long: str) -> None:
    said = in_words(ValueError(f"unknown class name {long!r}; names are a, b"))
    assert said.startswith("unknown class name 'x" if long[0] == "x" else "unknown class name 'a word")
    assert said.endswith("names are a, b")
    assert len(said) < 200
    plain = "extractor 'one' would be downloaded, and that is not what is allowed here, says the operator; choose 'two'"
    assert in_words(ValueError(plain)) == plain

"""What `diffattn evaluate` prints of a result, and `diffattn evaluate compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffattn.cli.common import bad_input, check_writable, stdout, write_json
from diffattn.cli.options import JsonFile


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A result.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="The result to compare with it.")],
    may_differ: Annotated[
        str,
        typer.Option(help="Protocol fields that may differ because they are what you compare, e.g. steps,guidance."),
    ] = "",
    json: JsonFile = None,
) -> None:
    """Say whether the second result's scores differ from the first's, each with a 95 % interval of the difference.

    Scores of single pictures (PSNR, LPIPS, CLIP score, ...) are compared over the same prompts and seeds: bootstrap
    interval over the pairs, and the sign test. FID, KID and sFID: an interval from leaving out a twentieth of the
    pictures of both sets at a time. Where the interval contains 0, no difference is shown.

    Refuses results whose protocols differ, naming the fields.
    """
    check_writable(json)
    with bad_input():
        from diffattn.evaluation.differences import difference_table, differences
        from diffattn.evaluation.quality import QualityResult
        from diffattn.evaluation.quality import compare as plain_differences
        from diffattn.files import read_json

        a, b = (QualityResult.from_dict(read_json(path)) for path in (first, second))
        fields = [name.strip() for name in may_differ.split(",") if name.strip()]
        changes, found = plain_differences(a, b, fields), differences(a, b, fields)
    stdout.print(f"A: {a.subject}\nB: {b.subject}", markup=False)
    stdout.print(difference_table(found), markup=False)
    write_json(json, {"a": a.to_dict(), "b": b.to_dict(), "b_minus_a": changes,
                      "differences": {x.score: x.to_dict() for x in found}})  # fmt: skip


def show_worst_pairs(result: Any, out: Path, show: bool) -> None:
    """The worst pairs in words, and the sheet that shows them."""
    found = result.details.get("worst_pairs")
    if found is None:
        return
    stdout.print(f"worst pairs by {found['by']}:", markup=False)
    pairs = [(pair, pair["title"]) for pair in found["worst"]]
    if found["middle"] not in found["worst"]:
        pairs.append((found["middle"], f"{found['middle']['title']} (the median pair)"))
    for pair, title in pairs:
        value = "identical" if pair[found["by"]] is None else f"{pair[found['by']]:.5g}"
        stdout.print(f"{value:>28}  {title}", markup=False)
    sheet = out / found["sheet"]
    stdout.print(f"look at them: {sheet}", markup=False)
    if show and typer.launch(str(sheet)) != 0:
        stdout.print("no picture viewer could be opened", markup=False)


def show_scores(result: Any) -> None:
    """The scores, then what was left out and why."""
    protocol = result.protocol
    stdout.print(f"{result.subject}: {protocol.num_pictures} pictures", markup=False)
    if protocol.steps is not None:
        guidance = "the pipeline's own guidance" if protocol.guidance is None else f"guidance {protocol.guidance:g}"
        stdout.print(f"{protocol.sampler}, {protocol.steps} steps, {guidance}, seeds {protocol.seeds}", markup=False)
    if "fid" in result.scores:
        stdout.print(result.label, markup=False)
    for name, value in result.scores.items():
        stdout.print(f"{name:<16}{value:12.5g}", markup=False)
    if "matched" in result.details:
        stdout.print(f"matched {result.details['matched']}", markup=False)
    for name, why in result.details.get("left_out", {}).items():
        stdout.print(f"no {name}: {why}", markup=False)
    if result.details.get("domain"):
        stdout.print(f"the extractor knows only {result.details['domain']}; its scores mean nothing for others",
                     markup=False)  # fmt: skip

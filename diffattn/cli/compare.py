"""`diffattn evaluate compare`."""

from pathlib import Path
from typing import Annotated

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
    pictures of both sets at a time. Where the interval holds 0, no difference is shown.

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

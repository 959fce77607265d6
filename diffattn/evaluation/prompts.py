"""Prompts to draw: from a text file, from a table, or DrawBench by its name."""

import csv
import io
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from diffattn.files import decode_text, read_lines

DRAWBENCH = "drawbench"
DRAWBENCH_ID = "sayakpaul/drawbench"
DRAWBENCH_COUNT = 200
"""DrawBench (Saharia et al. 2022): so many prompts of eleven kinds; a data set of the hub with one CSV file."""

TABLES = {".csv": ",", ".tsv": "\t"}
COLUMNS = ("prompt", "prompts", "text", "caption")  # in any case


def load_prompts(source: str | Path, cache: str | Path | None = None) -> list[str]:
    """The prompts of a file, or of DrawBench.

    A `.csv` or `.tsv` with a header has them in its column "prompt", "prompts", "text" or "caption"; any other file has
    one per line, read as by `diffattn.files.read_lines`. Empty ones are left out.

    Args:
        source: a file; or "drawbench" in any case, which is downloaded once, unless there is a file of that name.
        cache: folder of downloads; None: the hub's own.

    Raises:
        ValueError: a file that cannot be read or has no prompts, a table without such a column, a hub that cannot be
            reached.
    """
    path = Path(source)
    if str(source).lower() == DRAWBENCH and not path.exists():
        return _drawbench(cache)
    try:
        lines = _column(path) if path.suffix.lower() in TABLES else read_lines(path)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"prompts file {str(path)!r} cannot be read: {error}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"prompts file {str(path)!r} has no prompts")
    return prompts


def _column(path: Path) -> list[str]:
    text = decode_text(path.read_bytes())
    head, *rows = [*csv.reader(io.StringIO(text, newline=""), delimiter=TABLES[path.suffix.lower()])] or [[]]
    places = [i for i, name in enumerate(head) if name.strip().lower() in COLUMNS]
    if not places:
        raise ValueError(f"none of its columns ({', '.join(head)}) is named {', '.join(COLUMNS)}")
    return [row[places[0]] for row in rows if len(row) > places[0]]


def _drawbench(cache: str | Path | None) -> list[str]:
    for local in (True, False):  # cached files need no network
        try:
            folder = snapshot_download(
                DRAWBENCH_ID, repo_type="dataset", allow_patterns="*.csv", cache_dir=cache, local_files_only=local
            )
        except (OSError, HfHubHTTPError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        tables = sorted(Path(folder).glob("*.csv"))
        found = load_prompts(tables[0]) if tables else []
        if len(found) == DRAWBENCH_COUNT:
            return found
        why = f"{len(found)} prompts where {DRAWBENCH_COUNT} were expected"
    raise ValueError(
        f"the prompts of DrawBench could not be downloaded from the hub ({DRAWBENCH_ID}): {why}; give a file of prompts"
    )

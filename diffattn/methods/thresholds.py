"""The number of tokens from which agents beat exact attention, measured per device by `diffattn bench thresholds`."""

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from diffattn.files import is_there, user_folder

Thresholds = Mapping[str, Mapping[str, int | None]]
"""device type -> number of agents (landmarks), or `MERGE` -> smallest number of tokens at which they were faster; None
where they were slower up to the largest number that was measured."""

MERGE = "merge"
"""The row for agents merged by similarity, which cost more than others whatever their number."""


def user_file() -> Path:
    """The file of this machine's own measurements; `DIFFATTN_THRESHOLDS` overrides its path."""
    if path := os.environ.get("DIFFATTN_THRESHOLDS"):
        return Path(path)
    return user_folder("XDG_CONFIG_HOME", ".config") / "diffattn" / "thresholds.json"


def shipped_file() -> Path:
    """The table inside the package."""
    return Path(str(files("diffattn"))) / "assets" / "thresholds.json"


def load_thresholds() -> Thresholds:
    """The shipped table, with the rows of devices measured on this machine replaced.

    Raises:
        ValueError: the machine's own file is damaged.
    """
    table = dict(read_thresholds(shipped_file()))
    own = user_file()
    return table | read_thresholds(own) if is_there(own) else table


def read_thresholds(path: Path) -> dict[str, dict[str, int | None]]:
    """The table of one file.

    Raises:
        ValueError: not such a table; the message names the file and what to do.
    """
    try:
        table = json.loads(path.read_text())["devices"]
        return {device: {_key(n): _tokens(x) for n, x in _row(row).items()} for device, row in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} does not contain thresholds ({type(error).__name__}: {error}); "
            "delete it, then measure again with `diffattn bench thresholds`"
        ) from None


def _row(row: Mapping[str, int | None]) -> Mapping[str, int | None]:
    if not set(row) - {MERGE}:
        raise ValueError("a device without numbers of agents")
    return row


def _key(key: str) -> str:
    return key if key == MERGE else str(int(key))


def _tokens(tokens: int | None) -> int | None:
    return None if tokens is None else int(tokens)


def min_tokens_for(table: Thresholds, device: str, num_agents: int | None) -> int | None:
    """Smallest number of tokens at which agents are faster than exact attention on a device type; None: not known.

    Args:
        table: from `load_thresholds`.
        device: torch device type; an unmeasured one counts as "cuda".
        num_agents: number of landmarks or pooled agents; interpolated linearly between measured numbers, and in
            proportion above the largest; not known beside a number that is not. None: agents merged by similarity.
    """
    row = table.get(device, table["cuda"])
    pooled = {int(n): tokens for n, tokens in row.items() if n != MERGE}
    largest = max(pooled)
    if num_agents is None:
        return row.get(MERGE, pooled[largest])
    if num_agents > largest:
        most = pooled[largest]
        return None if most is None else most * num_agents // largest
    above = min([n for n in pooled if n >= num_agents])  # lists, which compiled code can take
    below = max([n for n in pooled if n <= num_agents] or [above])
    low, high = pooled[below], pooled[above]
    if low is None or high is None:
        return None
    return low if above == below else low + (high - low) * (num_agents - below) // (above - below)


def below_smallest(smallest: int | None, num_tokens: int) -> str | None:
    """The reason that exact attention counts as faster with fewer than `smallest` tokens, or where that is not known
    (None); otherwise None."""
    if smallest is None:
        return f"{num_tokens} tokens: exact attention was faster at all sizes measured by diffattn bench thresholds"
    return f"{num_tokens} tokens: exact attention is faster below {smallest}" if num_tokens < smallest else None

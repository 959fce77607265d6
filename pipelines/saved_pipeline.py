"""What is done to a pipeline's folder after diffusers has saved it."""

from __future__ import annotations

import json
from pathlib import Path


def drop_origin(folder: Path) -> None:
    """Take the place of training, which diffusers writes down, out of the configurations of a saved pipeline."""
    for path in sorted(folder.rglob("*.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")

"""A file in a folder that must not be entered."""

from pathlib import Path
from typing import Any

import pytest


def close(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse what `Path` asks the system about a file, as for a user who may not enter its folder; root always may."""
    stat = Path.stat

    def refused(asked: Path, **how: Any) -> Any:
        if asked == path:
            raise PermissionError(13, "Permission denied")
        return stat(asked, **how)

    monkeypatch.setattr(Path, "stat", refused)

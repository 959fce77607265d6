"""Names of files that are made of prompts."""

import re

MAX_BYTES = 180  # of a stem: file systems take 255 in a name, and what tells pictures of a prompt apart comes behind it


def stem_of(prompt: str) -> str:
    """The words of a prompt with hyphens between them, at most `MAX_BYTES` in UTF-8; "empty" where there are none."""
    words = re.sub(r"\W+", "-", prompt).strip("-")[:60]
    return words.encode()[:MAX_BYTES].decode(errors="ignore").strip("-") or "empty"

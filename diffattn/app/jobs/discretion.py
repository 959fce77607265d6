"""What a visitor writes stays out of the log: messages of errors and of libraries may quote it."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("diffusers", "transformers", "huggingface_hub")


def without_words(error: BaseException) -> str:
    """The stack and type of an error, and of those that led to it, without their messages."""
    parts: list[str] = []
    found: BaseException | None = error
    while found is not None:
        parts.append("".join(traceback.format_tb(found.__traceback__)) + type(found).__name__)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "\nbrought about by\n".join(parts)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block the libraries that see prompts log errors only: a prompt that is too long is quoted in a warning
    of diffusers, a name on the hub in those of its client."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

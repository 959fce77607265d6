"""Keeps what a visitor types out of the log: messages of errors and of libraries may quote it."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("diffusers", "transformers", "huggingface_hub")


def without_words(error: BaseException) -> str:
    """The stack and type of an error and of those that caused it, without their messages."""
    parts: list[str] = []
    found: BaseException | None = error
    while found is not None:
        parts.append("".join(traceback.format_tb(found.__traceback__)) + type(found).__name__)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "\ncaused by\n".join(parts)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, libraries that see prompts log only errors: diffusers quotes a prompt that is too long in a
    warning, and the hub's client quotes names."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

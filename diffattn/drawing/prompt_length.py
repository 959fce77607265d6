"""How much of a prompt a pipeline reads: text encoders take a fixed number of tokens, and the rest is dropped."""

import inspect
from typing import Any

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
LONGEST = 10**6  # tokenizers without a limit name an astronomical one


def unread_part(pipe: Any, prompt: str) -> str:
    """The end of a prompt that none of a pipeline's text encoders reads; empty if all of it is read.

    With several encoders, the end that all of them drop.
    """
    found = [_unread(tokenizer, _limit(pipe, tokenizer), prompt) for tokenizer in _tokenizers(pipe)]
    return min(found, key=len, default="")


def _tokenizers(pipe: Any) -> list[Any]:
    named = (getattr(pipe, name, None) for name in TOKENIZERS)
    return [tokenizer for tokenizer in named if callable(tokenizer)]


def _limit(pipe: Any, tokenizer: Any) -> int:
    """Tokens that the pipeline reads, those that mark begin and end included."""
    limit = int(getattr(tokenizer, "model_max_length", LONGEST))
    of_call = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    if of_call is not None and isinstance(of_call.default, int):
        return of_call.default
    return limit


def _unread(tokenizer: Any, limit: int, prompt: str) -> str:
    """The text after the last token that fits."""
    if limit >= LONGEST:
        return ""
    whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(whole) <= limit:
        return ""
    words = prompt.split()
    low, high = 0, len(words)  # words that fit, and that do not
    while low + 1 < high:
        middle = (low + high) // 2
        fits = len(tokenizer(" ".join(words[:middle]), truncation=False, verbose=False).input_ids) <= limit
        low, high = (middle, high) if fits else (low, middle)
    return " ".join(words[low:])

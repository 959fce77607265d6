"""Writes the table of what a patch was tested beside, from the decorators of the tests themselves.

As a hook of mkdocs it replaces `<!-- coexistence -->` in a page. The tests are read, not run and not imported: what
stands in the table is what `coexists` in tests/support/coexistence.py gives each of them.
"""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[2] / "tests" / "coexistence"
MARK, DECORATOR = "<!-- coexistence -->", "coexists"


def rows(source: str) -> Iterator[tuple[str, str, str, str]]:
    """Neighbour, how, classes and what holds, of every test of a source.

    Raises:
        ValueError: a decorator with anything but literals.
    """
    for node in ast.walk(ast.parse(source)):
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == DECORATOR:
                neighbour, how = (ast.literal_eval(argument) for argument in call.args)
                named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
                classes = ", ".join(f"`{name}`" for name in named["on"])
                yield neighbour, how, classes, named["holds"] + _condition(named.get("needs"))


def _condition(needs: str | None) -> str:
    if needs is None:
        return ""
    if needs == "a GPU":
        return " (untested so far: it needs a GPU)"
    return "" if find_spec(needs) else f" (untested here: {needs} is not installed)"


def coexistence_table() -> str:
    """One row per test, in the order of their files."""
    found = [row for path in sorted(TESTS.glob("test_*.py")) for row in rows(path.read_text(encoding="utf-8"))]
    lines = [("beside", "how", "on", "what holds"), ("---",) * 4, *found]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: the table in the place of its mark."""
    return markdown.replace(MARK, coexistence_table()) if MARK in markdown else markdown


if __name__ == "__main__":
    print(coexistence_table())

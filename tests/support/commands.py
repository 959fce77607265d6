"""Runs `diffattn` in this process."""

from typer.testing import CliRunner, Result

from diffattn.cli import app


def call(*words: object) -> Result:
    """The result of a command, such as `call("info", "--model", "emoji-sd")`."""
    return CliRunner().invoke(app, [str(word) for word in words])

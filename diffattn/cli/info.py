"""`diffattn info`."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from diffattn.cli.common import JsonFile, bad_input, check_writable, stdout, write_json


def info(json: JsonFile = None) -> None:
    """Versions, devices and what is supported.

    Lists the denoisers, the methods with their options and presets, the embedded models and the thresholds in use.
    """
    check_writable(json)
    with bad_input():
        from diffattn.capabilities import capabilities

        found = capabilities()
    write_json(json, found)
    _print("versions", found["versions"])
    _print("devices", {name: _words(device) for name, device in found["devices"].items()})
    _print("supported denoisers", dict.fromkeys(found["architectures"], ""))
    for name, method in found["methods"].items():
        stdout.print(_method(name, method))
    models = found["embedded_models"].items()
    _print("embedded models", {n: f"{m['what']}{'' if m['installed'] else ' (not installed)'}" for n, m in models})
    thresholds = found["thresholds"]
    rows = {
        device: ", ".join(f"{agents} agents: {tokens}" for agents, tokens in row.items())
        for device, row in thresholds["devices"].items()
    }
    _print(f"tokens from which agents pay ({thresholds['file']})", rows)


def _print(title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, text in rows.items():
        table.add_row(*filter(None, (name, text)))
    stdout.print(table)


def _method(name: str, method: Mapping[str, Any]) -> Table:
    """One row per option, one column per preset; the last row is what changes with the noise level."""
    table = Table(title=f"method {name}: options and presets", title_justify="left")
    presets = method["presets"].values()
    for head in ("option", "default", *method["presets"]):
        table.add_column(head)
    for option, default in method["options"].items():
        values = (str(x["options"][option]) if option in x["options"] else "" for x in presets)
        table.add_row(option, str(default), *values)
    table.add_section()
    table.add_row("by noise level (1 noise, 0 data)", "", *(_schedule(x["schedule"]) for x in presets))
    return table


def _schedule(schedule: Mapping[str, Any] | None) -> str:
    if schedule is None:
        return "always the same"
    lines = (f"from {u}: {x if isinstance(x, str) else _words(x) or 'as above'}" for u, x in schedule.items())
    return "\n".join(lines)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())

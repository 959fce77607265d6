"""A pytest plugin that runs diffusers' own pipeline tests with every denoiser patched; CONTRIBUTING.md says how.

Each pipeline is patched when it is called and not patched yet. For every test the outcome and the calls of layers are
written as JSON, so that a patched run can be compared with an unpatched one:

    python tests/support/diffusers_plugin.py unpatched.json patched.json
"""

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import diffattn
from diffattn.architectures.denoisers import denoiser_of
from diffattn.patching.patch import find_patch

OPTIONS: Any = {"num_agents": 4, "max_head_error": float("inf"), "min_tokens": 0}
"""With these, every layer of the tests' tiny models that can be accelerated is."""


class Watch:
    """What happens in the test that runs."""

    def __init__(self) -> None:
        self.patches: list[diffattn.Patch] = []
        self.refused: Counter[str] = Counter()

    def patch(self, pipe: DiffusionPipeline) -> None:
        """Patch a pipeline whose denoiser is not patched, or keep the reason why it cannot be."""
        try:
            denoiser = denoiser_of(pipe)
            if find_patch(pipe if denoiser is None else denoiser) is None:
                if find_patch(pipe) is not None:  # a ControlNet that an earlier pipeline shares
                    diffattn.unpatch(pipe)
                self.patches.append(diffattn.patch(pipe, "agent", **OPTIONS))
        except (TypeError, ValueError) as error:
            self.refused[f"{type(pipe).__name__}: {type(error).__name__}: {error}"] += 1

    def counts(self) -> dict[str, Any]:
        """Calls of layers of everything that was patched, exact ones by their reason."""
        layers = [layer for patch in self.patches for layer in patch.report().layers]
        exact: Counter[str] = Counter()
        for layer in layers:
            exact.update(layer.passed_through)
        return {
            "accelerated": sum(layer.accelerated for layer in layers),
            "exact": dict(exact),
            "left_alone": dict(Counter(layer.left_alone for layer in layers if layer.left_alone)),
            "refused": dict(self.refused),
        }


class DiffusersPlugin:
    """Patches while tests run, and writes what became of them."""

    def __init__(self, path: Path, patches: bool) -> None:
        self.path = path
        self.patches = patches
        self.watch = Watch()
        self.tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.watch = Watch()
        result = yield
        self.tests.setdefault(item.nodeid, {}).update(self.watch.counts())
        self._write()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kept = self.tests.setdefault(report.nodeid, {"outcome": "passed"})
        if report.outcome != "passed" and kept["outcome"] != "failed":
            kept |= {"outcome": report.outcome, "why": str(report.longreprtext or report.longrepr)[-1500:]}

    def _write(self) -> None:
        total = Counter(test["outcome"] for test in self.tests.values())
        accelerated = sum(test.get("accelerated", 0) for test in self.tests.values())
        found = {"outcomes": dict(total), "accelerated": accelerated, "tests": self.tests}
        self.path.write_text(json.dumps(found, indent=1))

    def called(self, pipe: DiffusionPipeline) -> None:
        """A pipeline is about to be called."""
        if self.patches:
            self.watch.patch(pipe)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("diffattn")
    group.addoption("--diffattn-counts", type=Path, help="where to write outcomes and counts, as JSON")
    group.addoption("--diffattn-unpatched", action="store_true", help="the run to compare with: patch nothing")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--diffattn-counts")
    if path is None:
        return
    plugin = DiffusersPlugin(path, not config.getoption("--diffattn-unpatched"))
    config.pluginmanager.register(plugin)
    original = DiffusionPipeline.register_modules

    @functools.wraps(original)
    def register_modules(self: DiffusionPipeline, **modules: Any) -> None:
        """Every pipeline's constructor calls this: the first of a class has its `__call__` announced."""
        _announce(type(self), plugin.called)
        original(self, **modules)

    DiffusionPipeline.register_modules = register_modules  # type: ignore[method-assign]


def _announce(kind: Any, called: Callable[[DiffusionPipeline], None]) -> None:
    """Make calls of a pipeline's class call `called` first."""
    owner = next((base for base in kind.__mro__ if "__call__" in vars(base)), None)
    if owner is None or hasattr(owner.__call__, "announces"):
        return
    call = owner.__call__

    @functools.wraps(call)
    def announced(self: Any, *args: Any, **kwargs: Any) -> Any:
        called(self)
        return call(self, *args, **kwargs)

    announced.announces = True  # type: ignore[attr-defined]
    owner.__call__ = announced


def compare(unpatched: dict[str, Any], patched: dict[str, Any]) -> list[str]:
    """How a patched run differs from an unpatched one, line by line; both as written by the plugin."""
    before, after = unpatched["tests"], patched["tests"]
    passed = [name for name, test in before.items() if test["outcome"] == "passed"]
    run = [name for name in passed if name in after]
    failed = [name for name in run if after[name]["outcome"] != "passed"]
    refused: Counter[str] = Counter()
    for test in after.values():
        refused.update(test.get("refused", {}))
    return [
        f"{len(passed)} tests pass unpatched; {len(run)} of them were run patched, {len(run) - len(failed)} pass",
        f"{patched['accelerated']} calls of layers were accelerated, in "
        f"{sum(test.get('accelerated', 0) > 0 for test in after.values())} tests",
        *(f"fails patched: {name}: {after[name].get('why', '').strip().splitlines()[-1:]}" for name in failed),
        *(f"not patched, {number} times: {reason}" for reason, number in refused.most_common()),
    ]


if __name__ == "__main__":
    print("\n".join(compare(*(json.loads(Path(name).read_text()) for name in sys.argv[1:3]))))

"""Shared by the tests of the peers."""

import pytest


def needs(name: str) -> None:
    """Skips where a package is not installed."""
    packages = {"tome": "tomesd", "deepcache": "DeepCache", "tgate": "tgate", "cachedit": "cache_dit"}
    for kind, package in packages.items():
        if kind in name:
            pytest.importorskip(package, reason=f"{package} is not installed (see the extra `peers`)")

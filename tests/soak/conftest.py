"""Soak tests take minutes; they run with --soak only: python -m pytest tests/soak --soak."""

import pytest


def pytest_runtest_setup(item):
    """Skip everything in this folder unless it was asked for."""
    if not item.config.getoption("--soak"):
        pytest.skip("a soak test: runs with --soak")

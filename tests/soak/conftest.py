"""Soak tests take minutes; they run with --soak only: python -m pytest tests/soak --soak."""

import pytest


def pytest_runtest_setup(item):
    """Skip everything in this folder unless it was asked for."""
    if not item.config.getoption("--soak"):
        pytest.skip("a soak test: runs with --soak")


FIGURES = []


@pytest.fixture
def figure():
    """Note a measured figure, to be printed at the end: a line of text."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter):
    """Print the figures."""
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.line(line)

"""Shared by all tests: the repository root on the import path, few threads, and an end that waits for no worker."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(2)

from utils import end_workers  # noqa: E402 (needs the path)


def pytest_addoption(parser):
    """--soak runs the tests in soak/ too, which take minutes."""
    parser.addoption("--soak", action="store_true", help="run the soak tests in tests/soak too (minutes)")


def pytest_unconfigure():
    """A test that fails keeps its loaders alive, and with them their workers."""
    end_workers()

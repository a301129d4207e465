"""Shared by all tests: one thread, and an end that waits for no worker. The import path is in pyproject.toml.

OMP_NUM_THREADS gives tests and the programs that they start more threads.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported

import av  # noqa: F401 - before decord, whose libvpx would else take the place of PyAV's, which cannot encode with it

from utils import end_workers


def pytest_addoption(parser):
    """--soak runs the tests in soak/ too, which take minutes."""
    parser.addoption("--soak", action="store_true", help="run the soak tests in tests/soak too (minutes)")


# With pytest-xdist and --no-loadscope-reorder, the files that take longest begin first, so that workers end together.
SLOW = """learning benchmark severe run_class_finetuning run_class_finetuning_checkpoints run_smile_pretraining
    run_repetition_counting deepspeed_stepper hub commands reliability run_feature_extraction mini_benchmark
    visualization data_loading several_labels""".split()


def pytest_collection_modifyitems(items):
    """The slowest files come first, the others in their order."""
    place = {f"test_{name}.py": number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_unconfigure():
    """A test that fails keeps its loaders alive, and with them their workers."""
    end_workers()

"""A disk that fills up during a run: RLIMIT_FSIZE, set from outside while the program runs."""

import resource

import pytest

from checkpoints import LATEST, find_resume
from soak.runs import Run, checkpoint, equal, make_videos, same_end
from weights import read_checkpoint

STEPS = 16
FREE = resource.getrlimit(resource.RLIMIT_FSIZE)
FULL = 1_000_000, FREE[1]  # bytes a file; a checkpoint takes 28 million


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A list file, and the folder of a run."""
    folder = tmp_path_factory.mktemp("disk")
    list_file = make_videos(folder, 2 * STEPS)
    run = Run(list_file, folder / "whole")
    assert run.wait() == 0, run.text()[-3000:]
    return list_file, folder / "whole"


def set_limit(run, limit):
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, limit)


def test_a_disk_that_stays_full(undisturbed, tmp_path, figure):
    list_file, whole = undisturbed
    run = Run(list_file, tmp_path / "run")
    run.wait_for(rf"epoch 0 \[6/{STEPS}\]")
    set_limit(run, FULL)
    code = run.wait()
    warnings, end = run.find("could not write"), run.text().splitlines()[-1]
    assert code == 1 and len(warnings) == 2 and end.startswith("error: ") and "3 saves in a row failed" in end
    assert ("Traceback" not in run.text() and "File too large" in end) or "failed" in end
    last_step = max(run.steps())
    found, state = find_resume(str(tmp_path / "run"), "", True)
    assert found.name == LATEST and 4 <= state["step"] < last_step[1] + 1
    assert not list((tmp_path / "run").glob("*.tmp"))
    again = Run(list_file, tmp_path / "run")
    assert again.wait() == 0 and again.resumed_at() == (0, state["step"])
    assert same_end(whole, tmp_path / "run")
    figure(
        f"disk full for good: {LATEST} of step {state['step']} loads, training went on to step {last_step[1] + 1}, "
        "exit 1 with one line after the 3rd failed save; started again with room: weights identical"
    )


def test_a_disk_that_is_full_for_a_while(undisturbed, tmp_path, figure):
    """In the second epoch, with a whole checkpoint of the first one: it stays as it is."""
    list_file, whole = undisturbed
    run = Run(list_file, tmp_path / "run")
    run.wait_for(rf"epoch 1 \[3/{STEPS}\]")
    set_limit(run, FULL)
    run.wait_for("could not write")
    set_limit(run, FREE)
    state = read_checkpoint(tmp_path / "run" / "checkpoint-0.pth")
    assert state["epoch"] == 0 and equal(state["model"], checkpoint(whole, "checkpoint-0.pth")["model"])
    assert run.wait() == 0, run.text()[-3000:]
    failed = len(run.find("could not write"))
    assert 1 <= failed <= 2 and same_end(whole, tmp_path / "run")
    figure(f"disk full for {failed} save(s): as many warnings, and the run ended with identical weights")

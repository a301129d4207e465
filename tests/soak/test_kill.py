"""SIGKILL at random moments: the run, started again with the same command, ends as if nothing had happened."""

import os
import random
import signal
import time

import pytest

from soak.runs import Run, gone, make_videos, same_end

KILLS, STEPS, EPOCHS = 20, 24, 2


@pytest.fixture(scope="module")
def list_file(tmp_path_factory):
    """48 videos: 24 steps an epoch of 2 videos."""
    return make_videos(tmp_path_factory.mktemp("videos"), 2 * STEPS)


def start(list_file, folder, processes, **more):
    """A run with a total batch of 2: one process that accumulates nothing, or two with one video each."""
    return Run(list_file, folder, "--batch_size", str(2 // processes), processes=processes, **more)


@pytest.fixture(scope="module")
def undisturbed(list_file, tmp_path_factory):
    """{processes: (folder, loss by (epoch, step), seconds to the first step)} of runs that nothing disturbed."""
    folder, done = tmp_path_factory.mktemp("undisturbed"), {}

    def run(processes):
        if processes not in done:
            begin, whole = time.monotonic(), start(list_file, folder / str(processes), processes)
            whole.wait_for(r"epoch 0 \[1/")
            first_step = time.monotonic() - begin
            assert whole.wait() == 0, whole.text()[-3000:]
            done[processes] = folder / str(processes), whole.steps(), first_step
            assert list(whole.steps()) == all_steps()
        return done[processes]

    return run


def all_steps(first=(0, 0)):
    """(epoch, step) from `first` to the end of the run."""
    return [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS) if (epoch, step) >= first]


def go_on_check(run, losses):
    """A part of a run took, from where it went on, the very steps of the undisturbed run; returns them."""
    seen = run.steps()
    assert list(seen) == all_steps(run.resumed_at())[: len(seen)], run.text()[-3000:]
    assert all(losses[place] == loss for place, loss in seen.items())
    return list(seen)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_20_times(processes, list_file, undisturbed, tmp_path, figure):
    reference, losses, start_up = undisturbed(processes)
    rng = random.Random(processes)
    last_step = STEPS * EPOCHS
    targets = sorted(rng.sample(range(last_step - 8), KILLS))  # when to kill, in steps of the whole run
    starting = rng.sample(range(KILLS), 4)  # kills that come before the first step
    resumed, lost, left = [], 0, []
    for number, target in enumerate(targets):
        run = start(list_file, tmp_path / "run", processes)
        if number in starting:
            pause = rng.uniform(0.3, 1) * start_up
        else:
            run.wait_for(r"epoch \d+ \[")
            done = STEPS * run.resumed_at()[0] + run.resumed_at()[1]
            run.wait_for(r"epoch \d+ \[", count=max(1, target - done))
            pause = rng.uniform(0, 0.2)
        time.sleep(pause)
        left += run.ranks()
        assert len(run.ranks()) == processes or number in starting
        assert run.process.poll() is None, f"it ended before it was killed: {run.text()[-3000:]}"
        run.kill()
        steps = go_on_check(run, losses)
        if run.find("resuming from"):
            resumed.append(run.resumed_at())
        lost += len(steps)
    final = start(list_file, tmp_path / "run", processes)
    assert final.wait() == 0, final.text()[-3000:]
    lost += len(go_on_check(final, losses)) - last_step
    assert same_end(reference, tmp_path / "run")
    assert sorted(resumed) == resumed and len(set(resumed)) >= KILLS // 4  # it got on, from several places
    assert gone(left)
    figure(
        f"{processes} process(es), {KILLS} x SIGKILL at random moments: final weights and optimizer state identical "
        f"to the last bit; resumed at {len(set([*resumed, final.resumed_at()]))} different steps; "
        f"{lost} of {last_step + lost} steps made twice because they came after the last save"
    )


def test_one_of_two_ranks_is_killed(list_file, undisturbed, tmp_path, figure):
    """torchrun --max-restarts starts both again."""
    reference, losses, _ = undisturbed(2)
    run = start(list_file, tmp_path / "run", 2, restarts=3)
    for kill, rank in enumerate((1, 0)):
        run.wait_for(rf"epoch {kill} \[{7 + 4 * kill}/")
        ranks = run.ranks()
        assert len(ranks) == 2
        os.kill(ranks[rank], signal.SIGKILL)
        run.wait_for("resuming from", count=kill + 1)
    assert run.wait() == 0, run.text()[-3000:]
    assert same_end(reference, tmp_path / "run")
    assert all(losses[place] == loss for place, loss in run.steps().items())
    restarts = [line.split("checkpoint-")[1] for line in run.find("resuming from")]
    figure(
        f"rank 1, later rank 0 of two killed under torchrun --max-restarts 3: went on from {' and '.join(restarts)}, "
        "final weights identical"
    )
